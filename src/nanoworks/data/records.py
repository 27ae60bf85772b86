"""Local text and JSON Lines files, read a block of about a megabyte at a time, however large the file.

A file is cut into blocks at fixed byte positions, without scanning it; a record belongs to the block in which
its first byte lies. So any block is read on its own, and no record is lost, repeated or cut.
"""

from __future__ import annotations

import json
import mmap
import re
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from nanoworks.common.errors import UserError, nearest
from nanoworks.data.files import FileOptions, cut, find_files, in_split
from nanoworks.data.registry import SOURCES
from nanoworks.data.source import Document, Source

BLOCK = 1 << 20
ROLES = ("system", "user", "assistant")


class RecordOptions(FileOptions):
    errors: Literal["strict", "replace", "skip"] = Field(
        default="strict",
        description="for text that is not UTF-8: stop and name the place, put U+FFFD for the bytes, or leave the "
        "document out and count it (skip also covers lines that are not what they should be)",
    )


class Block(NamedTuple):
    path: Path
    start: int
    stop: int


class RecordSource(Source):
    """What text and JSON Lines share: blocks, records and decoding."""

    Options: ClassVar[type[RecordOptions]] = RecordOptions
    suffixes: ClassVar[tuple[str, ...]]

    def __init__(self, options: RecordOptions) -> None:
        super().__init__(options)
        self._blocks = [
            Block(path, start, min(start + BLOCK, path.stat().st_size))
            for path in find_files(options, self.suffixes)
            for start in range(0, path.stat().st_size, BLOCK)
        ]
        if not self._blocks:
            raise UserError(f"{self}: every file is empty")

    def __len__(self) -> int:
        return len(self._blocks)

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.options.path!r})"

    @abstractmethod
    def read(self, page: int) -> Iterator[Document | None]: ...

    def _decode(self, raw: bytes, path: Path, offset: int) -> str:
        """Decode bytes found at `offset` of a file; with errors: skip, bad ones become lone surrogates."""
        policy = {"strict": "strict", "replace": "replace", "skip": "surrogateescape"}[self.options.errors]
        try:
            return raw.decode("utf-8", policy).removeprefix("\ufeff" if offset == 0 else "")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}: not UTF-8 at byte {offset + error.start}; convert the file, or set errors: replace "
                "or errors: skip"
            ) from None


@SOURCES.register("text")
class TextSource(RecordSource):
    """Plain text. Without a `separator` a file is cut at paragraph or line ends into pieces of
    `document_chars`; with one, each stretch between two separator lines is a document."""

    class Options(RecordOptions):
        separator: str | None = Field(
            default=None,
            description="a line between two documents, e.g. <|endoftext|>; empty: a blank line",
        )
        document_chars: int | None = Field(
            default=2048, gt=0, description="longer documents are cut; null: at a megabyte at most"
        )

    suffixes = (".txt", ".md", ".rst", ".text")

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        if options.separator is None:
            self._separator = None
        else:
            line = re.escape(options.separator.encode())
            self._separator = re.compile(rb"^" + line + rb"[ \t]*\r?(?:\n|\Z)", re.MULTILINE)

    def read(self, page: int) -> Iterator[Document | None]:
        block = self._blocks[page]
        with _mapped(block.path) as data:
            for offset, raw in self._stretches(data, block):
                text = self._decode(raw, block.path, offset)
                for piece in cut(text, self.options.document_chars):
                    if in_split(self.options, piece.encode("utf-8", "surrogateescape")):
                        yield None if _SURROGATE.search(piece) else piece

    def _stretches(self, data: mmap.mmap, block: Block) -> Iterator[tuple[int, bytes]]:
        if self._separator is None:
            start, stop = _line_start(data, block.start), _line_start(data, block.stop)
            yield from [(start, data[start:stop])] if start < stop else []
        else:
            for start, raw in _records(data, block, self._separator):
                text = raw.strip(b"\r\n")
                yield from [(start + raw.index(text), text)] if text else []


@SOURCES.register("jsonl")
class JsonlSource(RecordSource):
    """JSON Lines. A line is `{"text": ...}` (see `field`), a conversation `{"messages": [...]}`, or the bare
    list of messages; when a line has both, it is a conversation."""

    class Options(RecordOptions):
        field: str = Field(default="text", description="the key that holds the text")

    suffixes = (".jsonl", ".ndjson")

    def read(self, page: int) -> Iterator[Document | None]:
        block = self._blocks[page]
        with _mapped(block.path) as data:
            for offset, raw in _records(data, block, _NEWLINE):
                if raw.strip() and in_split(self.options, raw):
                    yield self._parse(raw, data, block.path, offset)

    def _parse(self, raw: bytes, data: mmap.mmap, path: Path, offset: int) -> Document | None:
        text = self._decode(raw, path, offset)
        if _SURROGATE.search(text):
            return None
        try:
            return self._document(json.loads(text))
        except ValueError as error:
            if self.options.errors == "skip":
                return None
            line = 1 + sum(data[at : min(at + BLOCK, offset)].count(b"\n") for at in range(0, offset, BLOCK))
            reason = f"not JSON: {error}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise UserError(f"{path}:{line}: {reason}; correct the line, or set errors: skip") from None

    def _document(self, value: Any) -> Document:
        """The document that a line holds; ValueError says what is wrong with it."""
        if isinstance(value, list):
            return {"messages": check_messages(value)}
        if not isinstance(value, dict):
            raise ValueError("neither an object nor a list of messages")
        if "messages" in value:
            return {"messages": check_messages(value["messages"])}
        field = self.options.field
        if field not in value:
            keys = ", ".join(value) or "none"
            raise ValueError(f"no key {field!r}{nearest(field, value)}; the line has {keys}")
        if not isinstance(value[field], str):
            raise ValueError(f"{field!r} is not a text but {type(value[field]).__name__}")
        return value[field]


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Return `messages` if they are those of a Conversation; ValueError says what is wrong with them."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages is not a list with at least one message")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"message {number} has no role among {', '.join(ROLES)}")
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        for part in parts:
            if not (isinstance(part, dict) and isinstance(part.get("text"), str) and "type" in part):
                raise ValueError(f"the content of message {number} is neither text nor parts of type and text")
    return messages


_NEWLINE = re.compile(rb"\n")
_SURROGATE = re.compile("[\udc80-\udcff]")


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def _line_start(data: mmap.mmap, position: int) -> int:
    """The start of the first line that begins at or after `position`."""
    if position == 0:
        return 0
    newline = data.find(b"\n", position - 1)
    return len(data) if newline < 0 else newline + 1


def _records(data: mmap.mmap, block: Block, separator: re.Pattern[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, bytes) of each record that begins inside the block; it may end beyond it.

    `separator` matches at the end of a line at the latest, so a search from the start of the line before the
    block finds the one that ends at its border.
    """
    start = 0
    if block.start > 0:
        line = data.rfind(b"\n", 0, block.start - 1) + 1
        while (match := separator.search(data, line)) and match.end() < block.start:
            line = match.end()
        start = match.end() if match else len(data)
    while start < block.stop:
        match = separator.search(data, start)
        yield start, data[start : match.start() if match else len(data)]
        if match is None:
            return
        start = match.end()
