"""What was predicted beside what came of it: the last lines of a run, and `plan` in its run.json."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nanoworks.common.human import count
from nanoworks.train.plan.planner import Forecast


def predicted_against_actual(
    predicted: Forecast, *, steps: int, seconds: float, peak_bytes: Sequence[int]
) -> dict[str, Any]:
    """Figures of a run that took `steps` in `seconds`: tokens/s of all ranks, GiB of the fullest. JSON-like."""
    tokens = predicted.tokens_per_second * predicted.seconds.total  # of a step
    return {
        "way": predicted.name,
        "predicted": {
            "tokens_per_second": predicted.tokens_per_second,
            "memory_gib": predicted.memory.total / 2**30,
        },
        "actual": {"tokens_per_second": steps * tokens / seconds, "memory_gib": max(peak_bytes) / 2**30},
    }


def lines(figures: dict[str, Any]) -> list[str]:
    """The figures for a person."""
    return [
        _line("tokens/s", "tokens_per_second", count, figures),
        _line("memory of the fullest rank", "memory_gib", "{:.2f} GiB".format, figures),
    ]


def _line(name: str, key: str, text: Callable[[float], str], figures: dict[str, Any]) -> str:
    predicted, actual = figures["predicted"][key], figures["actual"][key]
    difference = f"{100 * (actual / predicted - 1):+.0f}%"
    return f"{name}: {text(predicted)} predicted, {text(actual)} actual ({difference})"
