from __future__ import annotations

from decimal import Decimal

import pytest

from nanoworks.tasks.answers import final_number, last_number, same_final_number


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so it is\n#### 72", "72"),
        ("#### 1,234", "1234"),
        ("#### -3.50 dollars", "-3.5"),
        ("#### 18.", "18"),
        ("####7", "7"),
        ("#### 5\n#### 6", "5"),
        ("the answer is 72", None),
        ("#### ...", None),
        ("#### 1.2.3", None),
    ],
)
def test_final_number(text, expected):
    assert final_number(text) == (None if expected is None else Decimal(expected))


def test_last_number():
    assert last_number("between 3 and 1,000.5 or so") == Decimal("1000.5")
    assert last_number("-4") == -4
    assert last_number("none") is None


def test_equal_numbers_are_right_however_they_are_written():
    assert same_final_number("#### 72.0", "#### 72")
    assert not same_final_number("#### 7", "#### 72")
    assert not same_final_number("72", "#### 72")
    assert not same_final_number("no number", "no number either")
