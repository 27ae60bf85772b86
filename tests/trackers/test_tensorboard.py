from __future__ import annotations

from dataclasses import replace

import pytest

from nanoworks.trackers import TrackedRun

pytest.importorskip("tensorboard", reason="needs the extra: pip install 'nanoworks[tensorboard]'")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nanoworks.trackers.tensorboard import TensorboardTracker


def test_scalars_are_written_and_a_resumed_run_has_no_duplicates(run: TrackedRun) -> None:
    for start, last, loss in ((0, 6, 1.0), (4, 8, 2.0)):
        tracker = TensorboardTracker(TensorboardTracker.Options(), replace(run, start_step=start))
        for step in range(start + 1, last + 1):
            tracker.log({"train/loss": loss}, step)
        tracker.close()
    events = EventAccumulator(str(run.directory / "tensorboard")).Reload()
    scalars = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert scalars == [(step, 1.0) for step in range(1, 5)] + [(step, 2.0) for step in range(5, 9)]
