"""From documents to token ids: the stretch of the pipeline between the mixture and the packer."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np

from nanoworks.common.errors import UserError
from nanoworks.data.mixture import Drawn, Mixture, MixtureReader
from nanoworks.data.source import Address, Conversation
from nanoworks.tokenizer import Tokenizer

CHUNK = 64
"""Documents encoded at once: enough to occupy a few threads, little enough to start soon."""


class Encoded(NamedTuple):
    """A document as tokens; `mask` is 1.0 where a token is supervised, None for text: everywhere."""

    address: Address
    ids: np.ndarray  # (n,) int32
    mask: np.ndarray | None  # (n,) float32


class EncodingOptions(NamedTuple):
    longest: int | None
    """The most tokens a conversation may have; None: any number."""
    overlong: Literal["truncate", "drop"]
    loss_on: Literal["all", "assistant"]
    threads: int


class EncodedReader:
    """The documents of a mixture, encoded; `held` are those that were drawn from it and not yet handed on."""

    def __init__(self, mixture: Mixture, reader: MixtureReader, tokenizer: Tokenizer, options: EncodingOptions) -> None:
        self.truncated = self.dropped = 0
        self._mixture, self._reader, self._tokenizer, self._options = mixture, reader, tokenizer, options
        self._ready: deque[Encoded] = deque()
        self._last_epoch = reader.epoch  # in which a document was kept

    def __iter__(self) -> Iterator[Encoded]:
        return self

    def __next__(self) -> Encoded:
        while not self._ready:
            chunk = list(islice(self._reader, CHUNK))
            if not chunk:
                raise StopIteration
            self._ready.extend(self._encode(chunk, count=True))
            if self._ready:
                self._last_epoch = self._reader.epoch
            elif self._reader.epoch > self._last_epoch + 1:
                raise UserError(
                    f"every conversation is longer than a row ({self._options.longest} tokens) and overlong is drop; "
                    "raise data.sequence_length or set data.overlong: truncate"
                )
        return self._ready.popleft()

    def held(self) -> list[Address]:
        return [document.address for document in self._ready]

    def restore(self, addresses: list[Address]) -> None:
        """Read and encode again the documents that were held, here or in the packer, when a state was saved."""
        documents = self._mixture.fetch(addresses)
        self._ready.extend(self._encode(map(Drawn, addresses, documents), count=False))

    def _encode(self, drawn: Iterable[Drawn], *, count: bool) -> Iterator[Encoded]:
        drawn = list(drawn)
        texts = [document for _, document in drawn if isinstance(document, str)]
        encoded = iter(self._tokenizer.encode_batch(texts, bos=True, threads=self._options.threads))
        for address, document in drawn:
            if isinstance(document, str):
                yield Encoded(address, np.array(next(encoded), dtype=np.int32), None)
            elif (kept := self._render(address, document, count)) is not None:
                yield kept

    def _render(self, address: Address, conversation: Conversation, count: bool) -> Encoded | None:
        longest = self._options.longest
        # One token more than fits tells a conversation that was cut from one that just fits.
        rendered = self._tokenizer.render(conversation, None if longest is None else longest + 1)
        if longest is not None and len(rendered.ids) > longest:
            if self._options.overlong == "drop":
                self.dropped += count
                return None
            self.truncated += count
        ids = np.array(rendered.ids[:longest], dtype=np.int32)
        mask = np.array(rendered.mask[:longest], dtype=np.float32)
        return Encoded(address, ids, np.ones_like(mask) if self._options.loss_on == "all" else mask)
