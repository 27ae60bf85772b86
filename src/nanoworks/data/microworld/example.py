"""One question of the micro-world with its reference answer, and the rule that splits train from test.

The split hangs on `Example.key` alone: the content of the question (operands, word, fact and phrasing), not
the names it is dressed in. A key belongs to `test` or to `train` for ever, whatever the seed and wherever
it is rendered: as a conversation or inside a plain-text document.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

Split = Literal["train", "test"]
TEST_PERCENT = 15

Draw = Callable[[Random], "Example"]
"""Draws any example of one kind, of either split."""


@dataclass(frozen=True)
class Example:
    """`parts` is the reference answer, as (type, text) with nanochat's types text, python, python_output."""

    key: str
    question: str
    parts: tuple[tuple[str, str], ...]
    answer: str
    """What an answer must state to be right: a number, a value, a letter, a spelled word."""
    wrong: tuple[str, ...] = ()
    """What it must not state besides: the other values of a fact."""

    def conversation(self) -> dict[str, Any]:
        """Return nanochat's conversation form; the content is a plain string where the answer is only text."""
        content: Any = [{"type": kind, "text": text} for kind, text in self.parts]
        if len(content) == 1:
            content = content[0]["text"]
        messages = [{"role": "user", "content": self.question}, {"role": "assistant", "content": content}]
        return {"messages": messages}

    def text(self) -> str:
        """Return the same question and answer as plain text, a calculation written as `12+7 = 19`."""
        shown = {"text": "{}", "python": "{}", "python_output": " = {}\n"}
        answer = "".join(shown[kind].format(text) for kind, text in self.parts)
        return f"Question: {self.question}\nAnswer: {answer}\n"


def split_of(key: str) -> Split:
    """Return the split a key belongs to. CRC-32, because `hash` changes from process to process."""
    return "test" if zlib.crc32(key.encode()) % 100 < TEST_PERCENT else "train"


def draw_from(draw: Draw, rng: Random, split: Split) -> Example:
    """Draw examples until one belongs to `split`."""
    while True:
        example = draw(rng)
        if split_of(example.key) == split:
            return example


def distinct_examples(draw: Draw, split: Split, count: int, *, seed: int) -> list[Example]:
    """Return `count` examples of `split`, no two with the same question; fewer where the kind has no more."""
    rng = Random(seed)
    found: dict[str, Example] = {}
    misses = 0
    while len(found) < count and misses < 2000:  # of a kind with 300 left to find, none in 2000 draws
        example = draw_from(draw, rng, split)
        misses = misses + 1 if example.question in found else 0
        found[example.question] = example
    return list(found.values())
