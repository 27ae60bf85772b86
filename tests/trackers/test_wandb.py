"""wandb for real, offline: what it wrote is read back from its run file."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanoworks.trackers import TrackedRun

pytest.importorskip("wandb", reason="needs the extra: pip install 'nanoworks[wandb]'")

import wandb
from wandb.proto import wandb_internal_pb2

from nanoworks.trackers.wandb import WandbTracker


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))


def _records(path: Path) -> Iterator[bytes]:
    """Read wandb's run file: LevelDB's log, parts of (checksum 4, length 2, type 1, data) in blocks."""
    content, block, record = path.read_bytes(), 32 * 1024, b""
    offset = 7  # the file's own header
    while offset + 7 <= len(content):
        if block - offset % block < 7:  # too short for a record's header: padding
            offset += block - offset % block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, offset)
        record += content[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            yield record
            record = b""


def _history(directory: Path) -> list[dict[str, object]]:
    (path,) = directory.glob("wandb/offline-run-*/*.wandb")
    rows = []
    for data in _records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    return rows


def test_an_offline_run_holds_every_step(run: TrackedRun) -> None:
    options = WandbTracker.Options(mode="offline", upload_artifacts=True)
    tracker = WandbTracker(options, run)
    for step in (1, 2, 3):
        tracker.log({"train/loss": 4.0 - step, "val/bpb": 1.5}, step)
    report = run.directory / "report.html"
    report.write_text("<p>done</p>")
    tracker.artifact(report)
    tracker.close()
    wandb.teardown()  # wandb's own process writes the last lines; wait for it
    rows = _history(run.directory)
    assert [(row["_step"], row["train/loss"], row["val/bpb"]) for row in rows] == [
        (1, 3.0, 1.5),
        (2, 2.0, 1.5),
        (3, 1.0, 1.5),
    ]
