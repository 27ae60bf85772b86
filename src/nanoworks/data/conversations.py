"""Any list of conversations as a data source: a task, several tasks together, or your own."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

from nanoworks.common.errors import UserError
from nanoworks.data.source import Conversation, Document, Source, SourceOptions


class Conversations(Protocol):
    """A `nanoworks.tasks.Task` is one."""

    def __len__(self) -> int: ...

    def conversation(self, i: int) -> Conversation: ...


class ConversationSource(Source):
    """Every conversation of every item once an epoch, shuffled together; an item listed twice counts twice.

    Each conversation is a page of its own, so ranks share them evenly and a resumed run reads only what it
    needs. The split was chosen when the items were made.
    """

    def __init__(self, *items: Conversations, shuffle: bool = True, limit: int | None = None) -> None:
        """`limit` takes the first so many conversations of each item; a limit past its end takes them all."""
        super().__init__(SourceOptions(split="all", shuffle=shuffle))
        self._items = items
        self._ends = list(accumulate(len(item) if limit is None else min(limit, len(item)) for item in items))
        if not self._ends or not self._ends[-1]:
            raise UserError(f"{self} has no conversation; give a task that has examples in this split")

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, page: int) -> Sequence[Document]:
        item = bisect_right(self._ends, page)
        start = self._ends[item - 1] if item else 0
        return [self._items[item].conversation(page - start)]

    def __str__(self) -> str:
        names = [getattr(item, "name", type(item).__name__) for item in self._items]
        return f"conversations of {', '.join(names)}"
