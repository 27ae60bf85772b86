"""metrics.jsonl: one line `{"step": ..., "time": ..., **metrics}` a call, the record reports are made of.

Append-only and flushed line by line, so that a killed run keeps all it had logged. A kill can leave half a
line at the end: readers skip it, and a resumed run removes it together with every line of a step after the
checkpoint it resumes from, since those steps will be logged again.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanoworks.common.files import atomic_write
from nanoworks.config.base import Frozen
from nanoworks.trackers.base import TRACKERS, TrackedRun

METRICS_FILE = "metrics.jsonl"


@TRACKERS.register("jsonl")
class JsonlTracker:
    class Options(Frozen):
        pass

    def __init__(self, options: Options, run: TrackedRun) -> None:
        path = run.directory / METRICS_FILE
        truncate_after(path, run.start_step)
        self._file = path.open("a", encoding="utf-8")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        line: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        line.update((name, _finite(value)) for name, value in metrics.items())
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def artifact(self, path: Path) -> None:
        """Files are found by their place in the run directory; nothing to write."""

    def close(self) -> None:
        self._file.close()


def read_jsonl(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the objects of a file and the number of lines that hold none (cut off or damaged).

    A file that does not exist is an empty one: the run has not logged yet.
    """
    rows, unreadable = [], 0
    for line in _lines(path):
        row = _parse(line)
        if row is None:
            unreadable += 1
        else:
            rows.append(row)
    return rows, unreadable


def truncate_after(path: Path, step: int) -> None:
    """Drop the lines of `path` whose `step` is greater than `step`, and the unreadable ones.

    It serves samples.jsonl as well. A kill leaves either the old file or the new one.
    """
    lines = _lines(path)
    kept = [line for line in lines if (row := _parse(line)) is not None and row.get("step", 0) <= step]
    if lines:
        atomic_write(path, "".join(line.decode() + "\n" for line in kept))


def _lines(path: Path) -> list[bytes]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    return [line for line in content.split(b"\n") if line.strip()]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode())
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _finite(value: float) -> float | None:
    """JSON has no NaN: a value that is not finite is written as null, which readers show as such."""
    number = float(value)
    return number if math.isfinite(number) else None
