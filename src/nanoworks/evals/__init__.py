"""Evaluation: tasks, the CORE metric and bits per byte, over the engine. See docs/evaluation.md."""

from nanoworks.evals.bpb import bits_per_byte
from nanoworks.evals.result import TaskResult
from nanoworks.evals.runner import Settings, evaluate
from nanoworks.evals.suite import Suite

__all__ = ["Settings", "Suite", "TaskResult", "bits_per_byte", "evaluate"]
