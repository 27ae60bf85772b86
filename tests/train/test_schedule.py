"""Schedules against the figures of the real nanochat (885a4f2), and their shapes."""

from __future__ import annotations

import pytest

from nanoworks.train.schedule import SCHEDULES, Linear, Trapezoid, rise

# total steps, options, {step: multiplier}
PRETRAIN = [
    (100, {}, {0: 1.0, 50: 1.0, 80: 1.0, 81: 0.95, 90: 0.5, 99: 0.05, 100: 0.0}),
    (21400, {}, {0: 1.0, 17120: 1.0, 17121: 0.999766355140187, 19260: 0.5, 21399: 0.00023364485981308412}),
    (
        50,
        {"warmup_ratio": 0.1, "warmdown_ratio": 0.4, "final_lr_fraction": 0.1},
        {0: 0.2, 1: 0.4, 2: 0.6, 5: 1.0, 30: 1.0, 40: 0.55, 41: 0.505, 49: 0.14500000000000002, 50: 0.1},
    ),
]
MOMENTUM = {0: 0.85, 1: 0.8503333333333333, 10: 0.8533333333333333, 299: 0.9496666666666667, 300: 0.95, 301: 0.95}


@pytest.mark.parametrize(("total", "options", "expected"), PRETRAIN)
def test_trapezoid_is_nanochats_pretraining(total: int, options: dict[str, float], expected: dict[int, float]) -> None:
    schedule = Trapezoid(Trapezoid.Options(**options))
    assert {step: schedule(step, total) for step in expected} == expected


@pytest.mark.parametrize(
    ("progress", "expected"), [(0.0, 1.0), (0.5, 1.0), (0.79, 1.0), (0.8, 1.0), (0.9, 0.5), (1.0, 0.0)]
)
def test_trapezoid_is_nanochats_midtraining(progress: float, expected: float) -> None:
    schedule = Trapezoid(Trapezoid.Options())
    assert schedule(round(progress * 1000), 1000) == pytest.approx(expected, abs=1e-12)


def test_linear_is_nanochats_finetuning() -> None:
    schedule = Linear(Linear.Options())
    assert [schedule(step, 8) for step in range(8)] == [1 - step / 8 for step in range(8)]


def test_momentum_rises_as_nanochats() -> None:
    assert {step: rise(0.85, 0.95, 300, step) for step in MOMENTUM} == MOMENTUM
    assert rise(0.85, 0.95, 0, 0) == 0.95


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_every_schedule_warms_up_and_stays_in_range(name: str) -> None:
    options = SCHEDULES.options(name)(warmup_steps=10)
    schedule = SCHEDULES.get(name)(options)
    values = [schedule(step, 100) for step in range(100)]
    assert values[:10] == [(step + 1) / 10 for step in range(10)]
    assert values[10] == 1.0
    after = values[10:]
    assert after == sorted(after, reverse=True)
    assert min(after) >= 0


@pytest.mark.parametrize("name", ["linear", "cosine", "trapezoid"])
def test_decays_end_at_the_final_fraction(name: str) -> None:
    schedule = SCHEDULES.get(name)(SCHEDULES.options(name)(final_lr_fraction=0.1))
    assert schedule(1000, 1000) == pytest.approx(0.1)
    assert schedule(0, 1) == 1.0


def test_the_longer_warmup_counts() -> None:
    schedule = Linear(Linear.Options(warmup_ratio=0.5, warmup_steps=2))
    assert schedule(1, 10) == 0.4
