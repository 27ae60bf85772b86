"""A byte tokenizer and sources in memory: the pipeline's tests know every token they expect."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest

from nanoworks.data import Document, Source, SourceOptions
from nanoworks.tokenizer import Rendered

BOS = 256


class ByteTokenizer:
    """A token is a byte; 256 is BOS. What the loader asks of a Tokenizer, and no more."""

    bos_id = BOS

    def encode_batch(self, texts: Sequence[str], *, bos: bool = False, threads: int = 1) -> list[list[int]]:
        return [[BOS] * bos + list(text.encode()) for text in texts]

    def render(self, conversation: dict[str, Any], max_tokens: int | None = None) -> Rendered:
        ids, mask = [BOS], [0]
        for message in conversation["messages"]:
            new = list(message["content"].encode())
            ids += new
            mask += [int(message["role"] == "assistant")] * len(new)
        return Rendered(ids[:max_tokens], mask[:max_tokens])


class MemorySource(Source):
    """Pages given as lists of documents."""

    def __init__(self, pages: Iterable[Sequence[Document | None]], *, shuffle: bool = False) -> None:
        super().__init__(SourceOptions(split="all", shuffle=shuffle))
        self.pages = [list(page) for page in pages]

    def __len__(self) -> int:
        return len(self.pages)

    def read(self, page: int) -> list[Document | None]:
        return self.pages[page]


def _chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture(scope="session")
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture(scope="session")
def memory_source() -> type[MemorySource]:
    return MemorySource


@pytest.fixture(scope="session")
def chat() -> Callable[[str, str], dict[str, Any]]:
    """`chat(question, answer)` is a conversation of two messages."""
    return _chat
