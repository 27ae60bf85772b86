"""Numbers in answers: the `#### 42` that closes an answer of GSM8K and its like, and numbers in free text."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

_FINAL = re.compile(r"#### *(-?[0-9.,]+)")
_ANY = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def final_number(text: str) -> Decimal | None:
    """Return the number after the first `####`, or None. Commas group digits; a full stop ends it."""
    match = _FINAL.search(text)
    return _parse(match.group(1)) if match else None


def last_number(text: str) -> Decimal | None:
    """Return the last number anywhere in `text`, or None."""
    found = _ANY.findall(text)
    return _parse(found[-1]) if found else None


def same_final_number(completion: str, reference: str) -> bool:
    """True when both end in `#### number` with equal numbers (72 and 72.0 are equal)."""
    found = final_number(completion)
    return found is not None and found == final_number(reference)


def _parse(digits: str) -> Decimal | None:
    try:
        return Decimal(digits.replace(",", "").rstrip("."))
    except InvalidOperation:
        return None
