"""Prompt lookup: what followed the last time the text ended like this (https://github.com/apoorvumang/prompt-lookup-decoding).

No model is needed, and where an output repeats its prompt (edits, summaries, code, structured data) many tokens are
right at once. Each sequence has an index from every n-gram of `shortest` tokens to where it ended; a token costs one
dictionary entry, and a look-up compares a bounded number of places.
"""

from __future__ import annotations

from collections.abc import Sequence as ListOf
from typing import ClassVar

from nanoworks.engine.proposers import chain
from nanoworks.engine.sequence import Draft, Sequence

_PLACES = 16
"""Newest places of an n-gram that a look-up compares."""
_LONGEST = 32
"""Tokens after which a match counts as long enough."""


class NgramProposer:
    """Args: `shortest` tokens at least must match."""

    needs_hidden: ClassVar[bool] = False

    def __init__(self, shortest: int = 3) -> None:
        self.shortest = shortest
        self._indexes: dict[Sequence, Index] = {}

    def propose(self, sequences: ListOf[Sequence], limits: ListOf[int]) -> list[Draft | None]:
        drafts: list[Draft | None] = []
        for sequence, limit in zip(sequences, limits, strict=True):
            index = self._indexes.get(sequence)
            if index is None:
                index = self._indexes[sequence] = Index(self.shortest)
            drafts.append(chain(index.continuation(sequence.ids, limit)) if limit else None)
        return drafts

    def release(self, sequence: Sequence) -> None:
        self._indexes.pop(sequence, None)


class Index:
    """Of one growing list of tokens: where each n-gram of `n` tokens has ended."""

    def __init__(self, n: int) -> None:
        self.n = n
        self._ends: dict[tuple[int, ...], list[int]] = {}
        self._done = n  # n-grams that end before this place are in the index

    def continuation(self, ids: ListOf[int], limit: int) -> list[int]:
        """Return up to `limit` tokens that followed the longest earlier occurrence of the end of `ids`.

        `ids` is the list of the last call with more tokens behind it. Of equally long matches the newest wins; a match
        that runs into the end goes on with its own continuation, as a text that repeats itself does.
        """
        n, size = self.n, len(ids)
        for end in range(self._done, size):  # the n-gram at the very end is what is looked for
            self._ends.setdefault(tuple(ids[end - n : end]), []).append(end)
        self._done = max(self._done, size)
        best, longest = 0, 0
        for end in reversed(self._ends.get(tuple(ids[size - n :]), [])[-_PLACES:]):
            length = n
            while length < min(end, _LONGEST) and ids[end - 1 - length] == ids[size - 1 - length]:
                length += 1
            if length > longest:
                best, longest = end, length
        if not longest:
            return []
        followed = ids[best : best + limit]
        return [followed[i % len(followed)] for i in range(limit)]
