from __future__ import annotations

import pytest

from nanoworks.common import human


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7, "7"),
        (0.5, "0.5"),
        (99.94, "99.9"),
        (8_886.4, "8,886"),
        (9_999, "9,999"),
        (12_345, "12.3K"),
        (999_400, "999K"),
        (999_600, "1M"),
        (1_234_567, "1.23M"),
        (2.5e9, "2.5B"),
        (3e12, "3T"),
        (-12_345, "-12.3K"),
    ],
)
def test_count(value: float, text: str) -> None:
    assert human.count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0s"),
        (9.94, "9.9s"),
        (9.96, "10s"),
        (59.6, "1m 00s"),
        (192, "3m 12s"),
        (3599.7, "1h 00m"),
        (3840, "1h 04m"),
        (86_399, "1d 00h"),
        (183_600, "2d 03h"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert human.duration(seconds) == text


def test_percent() -> None:
    assert human.percent(0.4118) == "41.2%"
