"""Turns the lines of metrics.jsonl into curves and figures. Pure functions over `{step: value}`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from nanoworks.report.model import Series, Trend

Curve = Mapping[int, float]
"""Value by step, in the order of the steps."""

MAX_POINTS = 400  # a plot a few hundred pixels wide shows no more
NOT_METRICS = {"step", "time"}


def curves(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Curve], dict[str, int]]:
    """Return each metric's curve, and the first step at which a metric was not finite (null in the file).

    A step that was logged twice counts once, with its last value.
    """
    found: dict[str, dict[int, float]] = {}
    not_finite: dict[str, int] = {}
    for row in rows:
        step = row.get("step")
        if not isinstance(step, int):
            continue
        for name, value in row.items():
            if name in NOT_METRICS:
                continue
            if isinstance(value, (int, float)) and math.isfinite(value):
                found.setdefault(name, {})[step] = float(value)
            elif value is None or isinstance(value, float):
                not_finite[name] = min(step, not_finite.get(name, step))
    return {name: dict(sorted(curve.items())) for name, curve in found.items()}, not_finite


def trend(curve: Curve, *, highest: bool = False) -> Trend | None:
    """Return first, last and best value; the best is the lowest unless `highest`."""
    if not curve:
        return None
    values = list(curve.values())
    best_step = (max if highest else min)(curve, key=lambda step: curve[step])
    return Trend(first=values[0], last=values[-1], best=curve[best_step], best_step=best_step)


def median(curve: Curve) -> float | None:
    return statistics.median(curve.values()) if curve else None


def integral(curve: Curve) -> float | None:
    """Return the sum of a per-step figure over all steps; a value stands for the unlogged steps before it."""
    if not curve:
        return None
    total, previous = 0.0, 0
    for step, value in curve.items():
        total += value * (step - previous)
        previous = step
    return total


def series(curve: Curve) -> Series:
    """Return the curve, its running mean, both thinned to about `MAX_POINTS`."""
    steps, values = list(curve), list(curve.values())
    smooth = running_mean(values, width=len(values) // 25)
    kept = thin(values)
    return Series(
        steps=[steps[i] for i in kept],
        values=[_rounded(values[i]) for i in kept],
        smooth=[_rounded(smooth[i]) for i in kept],
    )


def _rounded(value: float) -> float:
    """Keep the digits a plot can show: most of report.json is curves."""
    return float(f"{value:.6g}")


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Return the mean of `width` values around each, of fewer at the ends: it leans to neither side."""
    sums = list(accumulate(values, initial=0.0))
    means = []
    for i in range(len(values)):
        half = min(width // 2, i, len(values) - 1 - i)
        means.append((sums[i + half + 1] - sums[i - half]) / (2 * half + 1))
    return means


def thin(values: Sequence[float]) -> list[int]:
    """Return the indices to keep: the lowest and highest of each stretch (spikes stay), and the ends."""
    if len(values) <= MAX_POINTS:
        return list(range(len(values)))
    stretches = MAX_POINTS // 2
    kept = {0, len(values) - 1}
    for i in range(stretches):
        stretch = range(i * len(values) // stretches, (i + 1) * len(values) // stretches)
        kept.add(min(stretch, key=values.__getitem__))
        kept.add(max(stretch, key=values.__getitem__))
    return sorted(kept)
