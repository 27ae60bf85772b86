"""Where a run's metrics go: the console, metrics.jsonl, TensorBoard, Weights & Biases."""

from nanoworks.trackers.base import TRACKERS, TrackedRun, Tracker, Trackers, open_trackers

__all__ = ["TRACKERS", "TrackedRun", "Tracker", "Trackers", "open_trackers"]
