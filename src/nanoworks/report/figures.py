"""The one place where a figure becomes text: the same digits in every rendering."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nanoworks.common import human
from nanoworks.report.model import Stage, Trend

MISSING = "–"
LOWER_IS_BETTER = {"loss", "perplexity", "bits per byte"}
NOT_A_FRACTION = LOWER_IS_BETTER | {"reward", "centered accuracy", "mean centered accuracy"}


def number(value: float | None) -> str:
    """Whole numbers in full with separators, others with four significant digits."""
    if value is None:
        return MISSING
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def loss(value: float | None) -> str:
    return MISSING if value is None else f"{value:.4f}"


def count(value: float | None) -> str:
    return MISSING if value is None else human.count(value)


def duration(seconds: float | None) -> str:
    return MISSING if seconds is None else human.duration(seconds)


def percent(fraction: float | None) -> str:
    return MISSING if fraction is None else human.percent(fraction)


def gib(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f} GiB"


def date(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    moment = datetime.datetime.fromtimestamp(seconds, tz=datetime.timezone.utc)
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def score(value: float | None, stderr: float | None, metric: str) -> str:
    """A task's result with its standard error: `92.3% ± 0.8`; what is no fraction: `1.2345 ± 0.0012`."""
    if value is None:
        return MISSING
    if metric in NOT_A_FRACTION:
        return f"{value:.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")
    return human.percent(value) + ("" if stderr is None else f" ± {100 * stderr:.1f}")


def score_delta(delta: float, metric: str) -> str:
    return f"{delta:+.4f}" if metric in NOT_A_FRACTION else f"{100 * delta:+.1f}"


def anything(value: Any) -> str:
    """A value of a recipe or of run.json, whatever it is."""
    if value is None:
        return MISSING
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return number(value)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings and lists as one level: `{"a": {"b": [1]}}` is `{"a.b.0": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        items = dict(enumerate(value)) if isinstance(value, list) else value
        if isinstance(items, Mapping) and items:
            flat.update(flatten({str(k): v for k, v in items.items()}, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


@dataclass(frozen=True)
class Figure:
    """A figure of a stage: its name, where it is, how it is written."""

    name: str
    of: Callable[[Stage], float | None]
    text: Callable[[float | None], str]


def _trend(name: str, of: Callable[[Stage], Trend | None]) -> tuple[Figure, ...]:
    def part(which: str) -> Callable[[Stage], float | None]:
        return lambda stage: getattr(of(stage), which, None)

    return tuple(Figure(f"{name}, {which}", part(which), loss) for which in ("first", "last", "best"))


STAGE_FIGURES = (
    Figure("Steps", lambda stage: stage.steps, number),
    Figure("Steps planned", lambda stage: stage.total_steps, number),
    Figure("Supervised tokens", lambda stage: stage.tokens, count),
    Figure("Time in steps", lambda stage: stage.train_seconds, duration),
    Figure("Wall time, pauses included", lambda stage: stage.elapsed_seconds, duration),
    Figure("Tokens per second (median)", lambda stage: stage.tokens_per_second, count),
    Figure("Tokens per second (predicted)", lambda stage: stage.predicted_tokens_per_second, count),
    Figure("MFU (median)", lambda stage: stage.mfu, percent),
    Figure("Memory (peak)", lambda stage: stage.memory_gib, gib),
    Figure("Memory (predicted)", lambda stage: stage.predicted_memory_gib, gib),
    *_trend("Loss", lambda stage: stage.loss),
    *_trend("Validation loss", lambda stage: stage.val_loss),
    *_trend("Validation bpb", lambda stage: stage.val_bpb),
    *_trend("Reward", lambda stage: stage.reward),
)
