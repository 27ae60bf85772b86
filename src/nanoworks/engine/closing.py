"""A short way from anywhere in a JSON document to its end, found by trying characters in a fixed order.

In a string the quote is tried first; outside of one what closes a bracket, then what separates, then the shortest
values. A schema's fixed parts come from the parser. Patterns of strings can defeat it; then there is no way (None).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

Scan = Literal["outside", "string", "escape"]
START: Scan = "outside"

LONGEST = 512
"""Tokens at most on a way."""

_OUTSIDE = [bytes([b]) for b in b'}],:"0123456789ntf[{-.eE+ ']
_STRING = [bytes([b]) for b in b'".@:/-_ 0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ']
_STRING += [bytes([b]) for b in (*b"!#$%&'()*+,;<=>?[]^`{|}~\\", 0x80, 0x90, 0xA0, 0xBF)]
_ESCAPE = [b'"', b"n", b"u"]


def scan(state: Scan, text: bytes) -> Scan:
    """Return where in a JSON text its next byte is, `text` after `state`."""
    for byte in text:
        if state == "escape":
            state = "string"
        elif byte == ord('"'):
            state = "outside" if state == "string" else "string"
        elif byte == ord("\\") and state == "string":
            state = "escape"
    return state


def closing(matcher: Any, spell: Callable[[bytes], list[int] | None], state: Scan, limit: int) -> list[int] | None:
    """Return tokens that make the document of `matcher` whole, or None if `limit` of them do not.

    The matcher is left as it was. `spell`: the tokens of some bytes, None if the vocabulary lacks one.
    """
    way: list[int] = []
    try:
        while not matcher.is_accepting():
            tokens, text = _next(matcher, spell, state)
            way += tokens
            if not tokens or len(way) > min(limit, LONGEST):
                return None
            state = scan(state, text)
        return way
    finally:
        matcher.rollback(len(way))


def _next(matcher: Any, spell: Callable[[bytes], list[int] | None], state: Scan) -> tuple[list[int], bytes]:
    """Take one stretch of the way; ([], b"") where there is none."""
    candidates = {"outside": _OUTSIDE, "string": _STRING, "escape": _ESCAPE}[state]
    for text in (matcher.compute_ff_bytes(), *candidates):
        tokens = spell(text)
        if tokens:
            taken = matcher.try_consume_tokens(tokens)
            if taken == len(tokens):
                return tokens, text
            matcher.rollback(taken)
    return [], b""
