from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoworks.trackers import TrackedRun
from nanoworks.trackers.jsonl import JsonlTracker, read_jsonl, truncate_after


def _open(run: TrackedRun) -> JsonlTracker:
    return JsonlTracker(JsonlTracker.Options(), run)


def _steps(path: Path) -> list[int]:
    return [row["step"] for row in read_jsonl(path)[0]]


def test_lines_carry_step_time_and_metrics(run: TrackedRun) -> None:
    tracker = _open(run)
    tracker.log({"train/loss": 1.5, "train/grad_norm": float("nan")}, 3)
    # Read before close: a line is on disk as soon as log returns.
    rows, unreadable = read_jsonl(run.directory / "metrics.jsonl")
    tracker.close()
    assert unreadable == 0
    assert rows == [{"step": 3, "time": rows[0]["time"], "train/loss": 1.5, "train/grad_norm": None}]


def test_a_resumed_run_logs_every_step_once(run: TrackedRun) -> None:
    path = run.directory / "metrics.jsonl"
    first = _open(run)
    for step in range(1, 8):
        first.log({"train/loss": 1.0}, step)
    first.close()
    with path.open("a") as file:
        file.write('{"step": 8, "train/lo')  # killed while writing
    second = _open(replace(run, start_step=5))
    for step in range(6, 11):
        second.log({"train/loss": 2.0}, step)
    second.close()
    assert _steps(path) == list(range(1, 11))
    assert read_jsonl(path)[1] == 0


def test_a_line_that_lost_only_its_newline_is_kept_whole(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    truncate_after(path, 5)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


@given(
    steps=st.lists(st.integers(0, 9), max_size=8),
    keep=st.integers(0, 9),
    tail=st.sampled_from(["", '{"st', "\0\0\0", "[1]", "\n\n", "\udcff"]),
)
def test_truncate_keeps_exactly_the_readable_lines_up_to_the_step(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], keep: int, tail: str
) -> None:
    path = tmp_path_factory.mktemp("t") / "m.jsonl"
    content = "".join(json.dumps({"step": step}) + "\n" for step in steps) + tail
    path.write_bytes(content.encode("utf-8", errors="surrogateescape"))
    assert _steps(path) == steps
    truncate_after(path, keep)
    assert _steps(path) == [step for step in steps if step <= keep]
    assert read_jsonl(path)[1] == 0
    assert [p.name for p in path.parent.iterdir()] == ["m.jsonl"]


def test_a_missing_file_reads_as_empty(tmp_path: Path) -> None:
    truncate_after(tmp_path / "none.jsonl", 3)
    assert read_jsonl(tmp_path / "none.jsonl") == ([], 0)
    assert not list(tmp_path.iterdir())


def test_a_killed_process_keeps_what_it_logged(tmp_path: Path) -> None:
    writer = f"""
from pathlib import Path
from nanoworks.trackers import TrackedRun
from nanoworks.trackers.jsonl import JsonlTracker
tracker = JsonlTracker(JsonlTracker.Options(), TrackedRun(Path({str(tmp_path)!r}), "i", "n", "s", 10))
step = 0
while True:
    step += 1
    tracker.log({{"train/loss": 1.0}}, step)
    print(step, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", writer], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    seen = [int(process.stdout.readline()) for _ in range(50)][-1]
    process.send_signal(signal.SIGKILL)
    process.stdout.close()
    process.wait()
    rows, unreadable = read_jsonl(tmp_path / "metrics.jsonl")
    assert unreadable <= 1
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert len(rows) >= seen
