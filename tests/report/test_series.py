from __future__ import annotations

import random

import pytest

from nanoworks.report import series


def test_curves_keep_the_last_value_of_a_step_and_sort_by_step() -> None:
    rows: list[dict[str, object]] = [
        {"step": 2, "time": 5.0, "a": 2.0},
        {"step": 1, "a": 1.0, "b": 7},
        {"step": 2, "a": 3.0},
        {"time": 5.0, "a": 9.0},
        {"step": 3, "a": "text", "b": None},
        {"step": 4, "b": float("inf")},
    ]
    curves, not_finite = series.curves(rows)
    assert {name: list(curve.items()) for name, curve in curves.items()} == {
        "a": [(1, 1.0), (2, 3.0)],
        "b": [(1, 7.0)],
    }
    assert not_finite == {"b": 3}


def test_trend_knows_which_way_is_better() -> None:
    curve = {1: 3.0, 2: 1.0, 3: 5.0, 4: 2.0}
    low, high = series.trend(curve), series.trend(curve, highest=True)
    assert low is not None
    assert (low.first, low.last, low.best, low.best_step) == (3.0, 2.0, 1.0, 2)
    assert high is not None
    assert (high.best, high.best_step) == (5.0, 3)
    assert series.trend({}) is None


def test_integral_fills_the_steps_between_logged_ones() -> None:
    assert series.integral({10: 0.5, 20: 1.0}) == pytest.approx(10 * 0.5 + 10 * 1.0)
    assert series.integral({}) is None


def test_thinning_keeps_the_ends_and_every_spike() -> None:
    rng = random.Random(1)
    values = [rng.gauss(0, 1) for _ in range(10_000)]
    values[4567], values[7777] = 100.0, -100.0
    kept = series.thin(values)
    assert len(kept) <= series.MAX_POINTS + 2
    assert kept == sorted(set(kept))
    assert {0, 4567, 7777, 9999} <= set(kept)
    assert series.thin([1.0, 2.0]) == [0, 1]


def test_running_mean_follows_a_line_without_lag() -> None:
    line = [2.0 * i for i in range(50)]
    assert series.running_mean(line, width=9) == pytest.approx(line)
    assert series.running_mean([0.0, 3.0, 0.0], width=3) == pytest.approx([0.0, 1.0, 0.0])
    assert series.running_mean([5.0], width=0) == [5.0]
