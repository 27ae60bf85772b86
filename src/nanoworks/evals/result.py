"""What an evaluation gives, and its files: `<task>.json` (the figures) and `<task>.jsonl` (each example)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanoworks.common.files import atomic_write, write_json


@dataclass(frozen=True)
class TaskResult:
    task: str
    kind: str
    metric: str
    value: float
    """NaN where the task failed; `error` then says why."""
    stderr: float = math.nan
    """Standard error of `value` over the examples."""
    n: int = 0
    """Examples scored, the failed ones among them."""
    failed: int = 0
    """Examples that could not be run; they count as wrong."""
    baseline: float = 0.0
    """What guessing gives."""
    settings: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    """Figures of the task's own: pass@k, the parts of a composite."""
    error: str | None = None
    examples: list[dict[str, Any]] = field(default_factory=list, repr=False)

    @property
    def centered(self) -> float:
        """The value on a scale where guessing is 0 and perfection 1."""
        return (self.value - self.baseline) / (1 - self.baseline)

    def summary(self, step: int | None = None) -> dict[str, Any]:
        """Return everything but the examples, JSON-able: NaN becomes null."""
        values = {
            "task": self.task,
            "kind": self.kind,
            "metric": self.metric,
            "value": _number(self.value),
            "stderr": _number(self.stderr),
            "n": self.n,
            "failed": self.failed,
            "baseline": self.baseline,
            "step": step,
            "settings": self.settings,
            "details": self.details,
        }
        return values if self.error is None else {**values, "error": self.error}

    def write(self, directory: Path, *, step: int | None = None) -> None:
        """Write both files into `directory`, made if it is missing."""
        directory.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in self.examples)
        atomic_write(directory / f"{self.task}.jsonl", lines)
        write_json(directory / f"{self.task}.json", self.summary(step))


def mean_and_stderr(scores: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error (0 for a single score)."""
    n = len(scores)
    mean = math.fsum(scores) / n
    if n < 2:
        return mean, 0.0
    return mean, math.sqrt(math.fsum((s - mean) ** 2 for s in scores) / (n - 1) / n)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Return the chance that one of k samples is right, drawn from n of which `correct` are.

    The unbiased estimator of https://arxiv.org/abs/2107.03374, equation 1.
    """
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
