"""The tracker interface, the table of trackers, and the group that keeps a failing one from killing a run.

Metrics carry the names they have in `metrics.jsonl`: `val/...` and `eval/...` come now and then, all others
(`train/...`, `rl/...`, `data/...`) with every step. Ratios (`train/mfu`) are fractions, memory is in GiB.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from nanoworks.common.errors import UserError
from nanoworks.common.registry import Registry
from nanoworks.config.base import Method

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker may know of the run it serves."""

    directory: Path
    id: str  # stays the same when the run is resumed
    name: str
    stage: str
    total_steps: int
    start_step: int = 0  # the step of the checkpoint it resumes from; 0 for a fresh run
    config: Mapping[str, Any] = field(default_factory=dict)  # the resolved recipe


class Tracker(Protocol):
    """Takes a run's figures somewhere. Opened with `(options, run)`; any method may raise."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record `metrics` of optimizer step `step`; called with steps that never decrease."""

    def artifact(self, path: Path) -> None:
        """Take note of a finished file or directory of the run, such as a checkpoint or a report."""

    def close(self) -> None:
        """Flush and let go; nothing is called afterwards."""


TRACKERS: Registry[Any] = Registry(
    "tracker",
    {
        "console": "nanoworks.trackers.console",
        "jsonl": "nanoworks.trackers.jsonl",
        "tensorboard": "nanoworks.trackers.tensorboard",
        "wandb": "nanoworks.trackers.wandb",
    },
)


class Trackers:
    """Several trackers as one that never raises: a tracker that fails is named in one warning and dropped.

    Metrics are not worth a run: a full disk or a lost network costs the curve, never the training.
    """

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self._alive = dict(trackers)

    @property
    def names(self) -> tuple[str, ...]:
        """The trackers still at work."""
        return tuple(self._alive)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._each(lambda tracker: tracker.log(metrics, step))

    def artifact(self, path: Path) -> None:
        self._each(lambda tracker: tracker.artifact(path))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())
        self._alive.clear()

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._alive.items()):
            try:
                call(tracker)
            except Exception as error:
                del self._alive[name]
                _warn(name, error)


def open_trackers(methods: Iterable[Method], run: TrackedRun) -> Trackers:
    """Open the named trackers for `run`.

    Raises UserError for what the user can mend now (an unknown name, a wrong option, a missing package); a
    tracker that cannot start for another reason (no network) is left out with a warning.
    """
    opened: dict[str, Tracker] = {}
    for method in methods:
        options = TRACKERS.parse(method.name, method.options, where=f"trackers.{method.name}")
        try:
            opened[method.name] = TRACKERS.get(method.name)(options, run)
        except UserError:
            raise
        except Exception as error:
            _warn(method.name, error)
    return Trackers(opened)


def _warn(name: str, error: Exception) -> None:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    logger.warning("tracker %s failed and is switched off for the rest of this run (%s)", name, reason)
