"""TensorBoard event files in the run directory: `tensorboard --logdir runs`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from nanoworks.common.errors import missing_extra
from nanoworks.config.base import Frozen
from nanoworks.trackers.base import TRACKERS, TrackedRun


@TRACKERS.register("tensorboard")
class TensorboardTracker:
    class Options(Frozen):
        directory: str = Field(default="tensorboard", description="inside the run directory")

    def __init__(self, options: Options, run: TrackedRun) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise missing_extra("tensorboard", "tensorboard") from None
        # purge_step hides what an earlier life of this run logged after the checkpoint it now resumes from.
        purge = run.start_step + 1 if run.start_step else None
        self._writer = SummaryWriter(str(run.directory / options.directory), purge_step=purge)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def artifact(self, path: Path) -> None:
        """TensorBoard keeps no files."""

    def close(self) -> None:
        self._writer.close()
