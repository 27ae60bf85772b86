"""Several sources read as one, each with its share of the text.

The next document always comes from the source that is furthest behind its share, measured in characters. So
proportions hold from the first batch on, whatever the lengths of the documents, and nothing is left to chance.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from nanoworks.common.errors import UserError
from nanoworks.data.source import Address, Conversation, Document, Reader, Source


class Drawn(NamedTuple):
    """A document of a mixture; `address` is [source, page, index in the page]."""

    address: Address
    document: Document


class Mixture:
    def __init__(self, sources: Sequence[Source], weights: Sequence[float] | None = None) -> None:
        """`weights` are shares of the text, relative to each other (default: equal)."""
        if not sources:
            raise UserError("the mixture is empty: name at least one data source")
        weights = [1.0] * len(sources) if weights is None else list(weights)
        if len(weights) != len(sources):
            raise UserError(f"the mixture has {len(sources)} sources but {len(weights)} weights")
        for source, weight in zip(sources, weights, strict=True):
            if not (math.isfinite(weight) and weight > 0):
                raise UserError(f"the weight of {source} is {weight}; give a positive number or leave it out")
        self.sources = list(sources)
        self.weights = weights

    def fetch(self, addresses: Iterable[Address]) -> list[Document]:
        """Return the documents at `addresses` in their order, each page read once."""
        addresses = list(addresses)
        wanted: dict[tuple[int, int], set[int]] = {}
        for number, page, index in addresses:
            wanted.setdefault((number, page), set()).add(index)
        pages = {
            (number, page): source.fetch(page, indices)
            for (number, page), indices in wanted.items()
            if page < len(source := self.sources[number])
        }
        try:
            return [pages[number, page][index] for number, page, index in addresses]
        except KeyError:
            raise UserError(
                "the data changed since the position in it was saved: a document of the buffer is gone; restore "
                "the data, or start a new run from the checkpoint with init_from"
            ) from None


class MixtureReader:
    """One rank's walk over a mixture; iterating yields `Drawn` until every source ended its `epochs`."""

    def __init__(
        self, mixture: Mixture, *, rank: int = 0, world_size: int = 1, seed: int = 0, epochs: int | None = None
    ) -> None:
        self._weights = mixture.weights
        self._readers = [
            Reader(source, rank=rank, world_size=world_size, seed=seed, epochs=epochs) for source in mixture.sources
        ]
        self._taken = [0] * len(self._readers)  # characters
        self._ended = [False] * len(self._readers)

    def __iter__(self) -> Iterator[Drawn]:
        return self

    def __next__(self) -> Drawn:
        while not all(self._ended):
            chosen = min(
                (taken / weight, number)
                for number, (taken, weight) in enumerate(zip(self._taken, self._weights, strict=True))
                if not self._ended[number]
            )[1]
            try:
                address, document = next(self._readers[chosen])
            except StopIteration:
                self._ended[chosen] = True
                continue
            self._taken[chosen] += size(document)
            return Drawn([chosen, *address], document)
        raise StopIteration

    @property
    def epoch(self) -> int:
        """Passes that every source has completed."""
        return min(reader.epoch for reader in self._readers)

    @property
    def skipped(self) -> int:
        return sum(reader.skipped for reader in self._readers)

    def state(self) -> dict[str, Any]:
        """Return the position, JSON-able."""
        return {"readers": [reader.state() for reader in self._readers], "taken": list(self._taken)}

    def load_state(self, state: dict[str, Any]) -> None:
        for reader, saved in zip(self._readers, state["readers"], strict=True):
            reader.load_state(saved)
        self._taken = list(state["taken"])
        self._ended = [False] * len(self._readers)


def size(document: Document) -> int:
    """Return the characters of a document's text, and one more, so that an empty one also counts."""
    return 1 + (len(document) if isinstance(document, str) else _conversation_size(document))


def _conversation_size(conversation: Conversation) -> int:
    total = 0
    for message in conversation["messages"]:
        content = message["content"]
        total += len(content) if isinstance(content, str) else sum(len(part["text"]) for part in content)
    return total
