"""What a data source is: numbered pages of documents. And `Reader`, one rank's walk over them.

A source says only how many pages it has and how to read one: a parquet row group, a megabyte of a text
file, one conversation of a task. Everything else is here, once, for every source: the order of an epoch,
the share of a rank, the position to resume from, and finding a document again by its address.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from nanoworks.common.errors import UserError
from nanoworks.config.base import Frozen

Conversation = dict[str, Any]
"""`{"messages": [{"role": ..., "content": str or a list of {"type", "text"} parts}]}`, nanochat's form."""

Document = str | Conversation

Address = list[int]
"""Where a document lies, whatever the epoch or the rank: [page, index in the page]."""


class SourceOptions(Frozen):
    """What every source can be told; a source's own `Options` adds to it."""

    split: Literal["train", "val", "all"] = Field(
        default="train", description="train and val never share a document; all: both"
    )
    shuffle: bool = Field(default=True, description="a new order of pages, and within a page, every epoch")


class Source(ABC):
    """One instance is one split of one data set. Reading it leaves no trace: positions live in `Reader`.

    A subclass provides `__len__` and `read`. The same page must always hold the same documents.
    """

    Options: ClassVar[type[SourceOptions]] = SourceOptions

    def __init__(self, options: Any) -> None:
        """`options` is an instance of the class's own `Options`; UserError when the data cannot be found."""
        self.options = options

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of pages."""

    @abstractmethod
    def read(self, page: int) -> Iterable[Document | None]:
        """Return the documents of a page, in a fixed order; None stands for one the options say to skip.

        Raises:
            UserError: the data is damaged or not what the options say; it names the file and the place.
        """

    def __str__(self) -> str:
        """Name the source in an error message and in a saved position."""
        return type(self).__name__

    def __iter__(self) -> Iterator[Document]:
        """Yield every document once, in the stored order: what training a tokenizer needs."""
        for page in range(len(self)):
            yield from (document for document in self.read(page) if document is not None)

    def fetch(self, page: int, indices: Collection[int]) -> dict[int, Document]:
        """Return the documents at `indices` of a page: how a resumed loader refills its buffer."""
        found: dict[int, Document] = {}
        for index, document in enumerate(self.read(page)):
            if index in indices and document is not None:
                found[index] = document
                if len(found) == len(indices):
                    break
        return found


class Reader:
    """One rank's walk over a source: an iterator of (address, document) for `epochs` passes (None: for ever).

    Ranks take whole pages in turn. With fewer pages than ranks they all read every page and take its
    documents in turn, so that a single small file still feeds every rank.
    """

    def __init__(
        self, source: Source, *, rank: int = 0, world_size: int = 1, seed: int = 0, epochs: int | None = None
    ) -> None:
        self.source = source
        self.epoch = 0
        self.skipped = 0
        """Documents passed over because they could not be read, since the first epoch."""
        self._rank, self._world_size, self._seed, self._epochs = rank, world_size, seed, epochs
        self._pages_in_turn = len(source) >= world_size
        self._ordinal = self._first_ordinal(0)  # of the current page, in the order of the epoch
        self._offset = 0  # of the next document, in the reading order of that page
        self._documents = self._walk()

    def __iter__(self) -> Iterator[tuple[Address, Document]]:
        return self

    def __next__(self) -> tuple[Address, Document]:
        return next(self._documents)

    def state(self) -> dict[str, int]:
        """Return the position, JSON-able, from which the next document follows."""
        return {
            "epoch": self.epoch,
            "ordinal": self._ordinal,
            "offset": self._offset,
            "skipped": self.skipped,
            "rank": self._rank,
            "world_size": self._world_size,
        }

    def load_state(self, state: dict[str, int]) -> None:
        """Continue from `state`: exactly if it is this rank's in a world of the same size, otherwise near it.

        Near: the walk goes on at the first turn of pages that no rank had begun. When every new rank is given
        the state of the same old rank, what they read is again disjoint.
        """
        self.epoch, self.skipped = state["epoch"], state["skipped"]
        ordinal, offset, world_size = state["ordinal"], state["offset"], state["world_size"]
        if (state["rank"], world_size) != (self._rank, self._world_size):
            if len(self.source) >= world_size:
                ordinal = -(-(ordinal + (offset > 0)) // world_size) * world_size
                offset = 0
            first = self._first_ordinal(ordinal)
            ordinal, offset = first, (offset if first == ordinal else 0)
        self._ordinal, self._offset = ordinal, offset
        self._documents = self._walk()

    def _first_ordinal(self, start: int) -> int:
        """The first page at or after `start` in the epoch's order that this rank reads."""
        if not self._pages_in_turn:
            return start
        return start + (self._rank - start) % self._world_size

    def _walk(self) -> Iterator[tuple[Address, Document]]:
        resumed = self._ordinal != self._first_ordinal(0) or self._offset > 0
        while self._epochs is None or self.epoch < self._epochs:
            order = self._order(len(self.source), self.epoch)
            empty = not resumed
            while self._ordinal < len(order):
                page = order[self._ordinal]
                for index, document in self._read(page):
                    self._offset += 1
                    if document is None:
                        self.skipped += 1
                    elif self._is_mine(index):
                        empty = False
                        yield [page, index], document
                self._ordinal += self._world_size if self._pages_in_turn else 1
                self._offset = 0
            if empty and (self._epochs is None or self._world_size == 1):
                raise UserError(self._nothing())
            self.epoch += 1
            self._ordinal = self._first_ordinal(0)
            resumed = False

    def _read(self, page: int) -> Iterator[tuple[int, Document | None]]:
        """Yield (index, document) of a page in reading order, from the current offset on."""
        documents = self.source.read(page)
        if not self.source.options.shuffle:
            yield from islice(enumerate(documents), self._offset, None)
            return
        held: Sequence[Document | None] = documents if isinstance(documents, list) else list(documents)
        for index in self._order(len(held), self.epoch, page)[self._offset :]:
            yield index, held[index]

    def _order(self, count: int, *key: int) -> Sequence[int]:
        if not self.source.options.shuffle:
            return range(count)
        return np.random.default_rng([self._seed, *key]).permutation(count).tolist()

    def _is_mine(self, index: int) -> bool:
        return self._pages_in_turn or (self._ordinal + index) % self._world_size == self._rank

    def _nothing(self) -> str:
        share = f" for rank {self._rank} of {self._world_size}" if self._world_size > 1 else ""
        return (
            f"{self.source} has no document{share} in the split {self.source.options.split!r}; "
            "check the path and the field, give more data or a larger val_fraction"
        )
