"""Packing documents into batches of rows: best fit, stream, padded.

A row has T + 1 tokens: T inputs and, one later, T targets. The weight of a position is the mask of its target.

- best_fit: every row starts with a document. Of the documents in a buffer the longest that fits is taken, again
  and again; when none fits, the shortest text is cropped to fill the row (a conversation is never cropped: the
  rest of the row is padding). Newer nanochat packs like this; best-fit decreasing is from Johnson et al., 1974.
- stream: documents end to end, cut wherever a row ends; nothing is lost and nothing padded. Older nanochat
  (November 2025) packs like this, to the token: each batch takes B * T + 1 tokens from the stream.
- padded: one document a row.

All three use up a finite stream of documents: no row is repeated and the last batch is filled with padding,
which has weight 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right, insort
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from nanoworks.data.encoding import Encoded
from nanoworks.data.source import Address


class Packed(NamedTuple):
    """One batch of B rows as arrays; T is `sequence_length`, or less for padded rows that are all shorter."""

    tokens: np.ndarray  # (B, T) int64
    targets: np.ndarray  # (B, T) int64
    weights: np.ndarray  # (B, T) float32
    documents: np.ndarray  # (B, T) int32: which document of its row a token belongs to; padding is one more
    padding: int
    """Positions whose target is padding."""


class Packer(ABC):
    """Keeps documents between batches: `held` are those it took and still needs, oldest first."""

    def __init__(self, *, batch_size: int, sequence_length: int, pad_id: int, buffer: int) -> None:
        self.batch_size = batch_size
        self.sequence_length = sequence_length
        self.pad_id = pad_id
        self.buffer = buffer
        self.skip = 0
        """Tokens of the oldest held document that earlier batches took."""
        self.cropped = 0
        """Tokens of documents that no row holds, since the start."""

    @abstractmethod
    def pack(self, documents: Iterator[Encoded]) -> Packed | None:
        """Return the next batch, or None when the documents are used up."""

    @abstractmethod
    def held(self) -> list[Address]: ...


class _Rows:
    """B rows of `width` tokens, filled from the left."""

    def __init__(self, count: int, width: int, pad_id: int) -> None:
        self.width = width
        self.ids = np.full((count, width), pad_id, dtype=np.int64)
        self.mask = np.zeros((count, width), dtype=np.float32)
        self.documents = np.zeros((count, width), dtype=np.int32)
        self.ends = [0] * count
        self._placed = [0] * count

    def place(self, row: int, document: Encoded) -> int:
        """Put a document behind those that are in the row; return how many of its tokens did not fit."""
        start = self.ends[row]
        stop = self.ends[row] = min(start + len(document.ids), self.width)
        self.ids[row, start:stop] = document.ids[: stop - start]
        self.mask[row, start:stop] = 1.0 if document.mask is None else document.mask[: stop - start]
        self._placed[row] += 1
        self.documents[row, stop:] = self._placed[row]
        return len(document.ids) - (stop - start)

    def packed(self, width: int) -> Packed:
        ids, mask = self.ids[:, :width], self.mask[:, 1:width]
        return Packed(
            np.ascontiguousarray(ids[:, :-1]),
            np.ascontiguousarray(ids[:, 1:]),
            np.ascontiguousarray(mask),
            np.ascontiguousarray(self.documents[:, : width - 1]),
            sum(width - max(end, 1) for end in self.ends),
        )


class BestFit(Packer):
    def __init__(self, *, batch_size: int, sequence_length: int, pad_id: int, buffer: int) -> None:
        super().__init__(batch_size=batch_size, sequence_length=sequence_length, pad_id=pad_id, buffer=buffer)
        # By order of arrival. The addresses apart, because every batch's state lists them all.
        self._pool: dict[int, Encoded] = {}
        self._addresses: dict[int, Address] = {}
        self._arrivals = 0
        # (length, -arrival), sorted: of equal lengths the oldest comes last, where bisect_right finds it.
        self._texts: list[tuple[int, int]] = []
        self._conversations: list[tuple[int, int]] = []

    def pack(self, documents: Iterator[Encoded]) -> Packed | None:
        rows = _Rows(self.batch_size, self.sequence_length + 1, self.pad_id)
        for row in range(self.batch_size):
            while (space := rows.width - rows.ends[row]) > 0:
                self._fill(documents)
                document = self._take(space)
                if document is None:
                    break
                self.cropped += rows.place(row, document)
        return rows.packed(rows.width) if any(rows.ends) else None

    def held(self) -> list[Address]:
        return list(self._addresses.values())

    def _fill(self, documents: Iterator[Encoded]) -> None:
        while len(self._pool) < self.buffer and (document := next(documents, None)) is not None:
            self._pool[self._arrivals] = document
            self._addresses[self._arrivals] = document.address
            insort(self._lengths(document), (len(document.ids), -self._arrivals))
            self._arrivals += 1

    def _take(self, space: int) -> Encoded | None:
        """Remove and return the longest document of at most `space` tokens, else the shortest text, else None."""
        fitting = [
            lengths[at - 1]
            for lengths in (self._texts, self._conversations)
            if (at := bisect_right(lengths, (space, 1)))
        ]
        if fitting:
            length, arrival = max(fitting)
        elif self._texts:
            length, arrival = self._texts[bisect_right(self._texts, (self._texts[0][0], 1)) - 1]
        else:
            return None
        document = self._pool.pop(-arrival)
        del self._addresses[-arrival]
        lengths = self._lengths(document)
        del lengths[bisect_right(lengths, (length, arrival)) - 1]
        return document

    def _lengths(self, document: Encoded) -> list[tuple[int, int]]:
        return self._texts if document.mask is None else self._conversations


class Stream(Packer):
    _current: Encoded | None = None

    def pack(self, documents: Iterator[Encoded]) -> Packed | None:
        size = self.batch_size * self.sequence_length + 1
        ids = np.full(size, self.pad_id, dtype=np.int64)
        mask = np.zeros(size, dtype=np.float32)
        starts = np.zeros(size, dtype=np.int32)
        end = 0
        while end < size:
            document = self._current = self._current or next(documents, None)
            if document is None:
                starts[end] = 1  # padding is a document of its own
                break
            begin, taken = end, min(len(document.ids) - self.skip, size - end)
            end += taken
            piece = slice(self.skip, self.skip + taken)
            ids[begin:end] = document.ids[piece]
            mask[begin:end] = 1.0 if document.mask is None else document.mask[piece]
            starts[begin] = 1  # at the start of the batch perhaps only the rest of one
            self.skip += taken
            if self.skip == len(document.ids):
                self._current, self.skip = None, 0
        if end < 2:
            return None
        shape = (self.batch_size, self.sequence_length)
        number = np.cumsum(starts[:-1], dtype=np.int32).reshape(shape)
        return Packed(
            ids[:-1].reshape(shape),
            ids[1:].reshape(shape),
            mask[1:].reshape(shape),
            number - number[:, :1],
            size - end,
        )

    def held(self) -> list[Address]:
        return [] if self._current is None else [self._current.address]


class Padded(Packer):
    """Rows are cut to the longest of the batch, rounded up to `MULTIPLE` so that few shapes occur."""

    MULTIPLE = 64

    def pack(self, documents: Iterator[Encoded]) -> Packed | None:
        rows = _Rows(self.batch_size, self.sequence_length + 1, self.pad_id)
        for row in range(self.batch_size):
            document = next(documents, None)
            if document is None:
                break
            self.cropped += rows.place(row, document)
        longest = max(rows.ends) - 1
        if longest < 0:
            return None
        width = max(1, -(-longest // self.MULTIPLE)) * self.MULTIPLE
        return rows.packed(min(width, self.sequence_length) + 1)

    def held(self) -> list[Address]:
        return []


PACKERS: dict[str, type[Packer]] = {"best_fit": BestFit, "stream": Stream, "padded": Padded}
