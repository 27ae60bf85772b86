from __future__ import annotations

from pathlib import Path

import pytest

from nanoworks.trackers import TrackedRun


@pytest.fixture
def run(tmp_path: Path) -> TrackedRun:
    return TrackedRun(tmp_path, id="r1", name="demo", stage="sft", total_steps=100, config={"seed": 1})
