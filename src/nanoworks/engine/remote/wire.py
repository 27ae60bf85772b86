"""What goes over the socket between a server and its engine's process.

Every message is framed by its length. Orders, to the engine, are pickled: `("add", key, Request)` and
`("cancel", key, None)`; a key is a number that names a request on this socket. Reports, from the engine, are marshalled
tuples of plain values, since there is one for every step with all that it made, and pickling 256 deltas would take
longer than all the rest of the server's work on them.
"""

from __future__ import annotations

import marshal
import struct
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from nanoworks.engine.request import Delta, EngineStats

_LENGTH = struct.Struct("!I")
_STATS = tuple(field.name for field in fields(EngineStats))

NO_STATS = EngineStats(*[0] * len(_STATS))

Row = tuple[Any, ...]
"""A key and the fields of a Delta but for its `request_id`; those that nearly always have their defaults are a tuple of
their own, or None."""


class Report(NamedTuple):
    """What a step made."""

    taken: int
    """Requests taken from the socket so far: those that were sent after them are not in the statistics."""
    stats: tuple[Any, ...]
    rows: list[Row]
    refused: list[tuple[int, str]]
    """Requests that can never run, and why."""


def frame(payload: bytes) -> bytes:
    return _LENGTH.pack(len(payload)) + payload


class Frames:
    """Puts messages together again from the pieces in which they arrive."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield the messages that `data` completes; to be read to the end."""
        self._buffer += data
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            end = start + _LENGTH.size + length
            if end > len(self._buffer):
                break
            yield bytes(self._buffer[start + _LENGTH.size : end])
            start = end
        del self._buffer[:start]


def pack_report(taken: int, stats: EngineStats, rows: list[Row], refused: list[tuple[int, str]]) -> bytes:
    return marshal.dumps((taken, tuple(getattr(stats, name) for name in _STATS), rows, refused))


def unpack_report(data: bytes) -> Report:
    return Report(*marshal.loads(data))


def unpack_stats(values: Sequence[Any]) -> EngineStats:
    return EngineStats(*values)


def row_of(key: int, delta: Delta) -> Row:
    rest: tuple[Any, ...] | None = None
    if delta.finish_reason or delta.top_logprobs or delta.queue_seconds is not None or delta.embedding or delta.error:
        rest = (
            delta.top_logprobs,
            delta.finish_reason,
            delta.error,
            delta.embedding,
            delta.queue_seconds,
            delta.cached_tokens,
        )
        if delta.prompt_logprobs:
            rest += (delta.prompt_logprobs, delta.prompt_top_logprobs)
    return (key, delta.index, delta.text, delta.token_ids, delta.logprobs, delta.mask, rest)


def delta_of(request_id: str, row: Row) -> Delta:
    _, index, text, token_ids, logprobs, mask, rest = row
    return Delta(request_id, index, text, token_ids, logprobs, mask, *(rest or ()))
