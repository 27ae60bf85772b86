"""Spelling, which language models find hard because they see tokens, not letters (nanochat's two tasks).

`simple_spelling` asks to spell a word. `spelling_bee` asks how often a letter occurs in one; its answer
spells the word, counts by hand and checks with the calculator tool. Examples are made from a seed as they are
asked for, out of words.txt or of your own list (`path`, one word a line). A word belongs to one split only.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from random import Random
from string import ascii_lowercase
from typing import Any, Literal

from pydantic import Field

from nanoworks.common.errors import UserError
from nanoworks.tasks.answers import same_final_number
from nanoworks.tasks.base import TASKS, Conversation, Task, TaskOptions

TEST_PERCENT = 15
WORDS = Path(__file__).with_name("words.txt")

QUESTIONS = (
    "How many {letter} are in {word}",
    "How many {letter} are in the word {word}",
    "How many {letter}s does {word} have",
    "How many times does {letter} occur in {word}",
    "How often do you see {letter} in {word}",
    "Count the {letter} in {word}",
    "Count every {letter} of the word {word}",
    "In {word}, how many letters are {letter}",
    "What is the number of {letter} in {word}",
    "Tell me how many {letter} there are in {word}",
    "Please count the letter {letter} in {word}",
    "{word}: how many {letter}",
    "Wie viele {letter} hat {word}",
    "Wie oft steht {letter} in {word}",
    "Combien de {letter} y a-t-il dans {word}",
    "¿Cuántas {letter} tiene {word}",
    "Quante {letter} ci sono in {word}",
    "Hoeveel {letter} zitten er in {word}",
)


class SpellingOptions(TaskOptions):
    split: Literal["train", "test"] = "test"
    size: int = Field(default=1000, gt=0, description="number of examples to make")


class _SpellingTask(Task):
    Options = SpellingOptions

    def __init__(self, options: SpellingOptions) -> None:
        self.split = options.split
        self.words = read_words(Path(options.path) if options.path else WORDS, options.split)
        self.size = min(options.size, options.limit or options.size)

    def __len__(self) -> int:
        return self.size

    def _draw(self, i: int) -> tuple[Random, str]:
        """Return the generator that decides everything about example i, and the example's word."""
        if not 0 <= i < self.size:
            raise IndexError(f"example {i} of {self.size}")
        rng = Random(f"{self.name}/{self.split}/{i}")
        return rng, rng.choice(self.words)


@TASKS.register("simple_spelling")
class SimpleSpelling(_SpellingTask):
    name = "simple_spelling"

    def conversation(self, i: int) -> Conversation:
        _, word = self._draw(i)
        return _conversation(f"Spell the word: {word}", f"{word}:{','.join(word)}")

    def score(self, i: int, completion: str) -> float:
        answer = self.conversation(i)["messages"][-1]["content"]
        return float(completion.strip() == answer)


@TASKS.register("spelling_bee")
class SpellingBee(_SpellingTask):
    name = "spelling_bee"

    def conversation(self, i: int) -> Conversation:
        word, letter, question = self._example(i)
        count = word.count(letter)
        parts = [
            {"type": "text", "text": f"{_count_by_hand(word, letter)}\n\nThe same with Python:\n\n"},
            {"type": "python", "text": f"'{word}'.count('{letter}')"},
            {"type": "python_output", "text": str(count)},
            {"type": "text", "text": f"\n\nPython counts {count} as well.\n\n#### {count}"},
        ]
        return _conversation(question, parts)

    def score(self, i: int, completion: str) -> float:
        word, letter, _ = self._example(i)
        return float(same_final_number(completion, f"#### {word.count(letter)}"))

    def _example(self, i: int) -> tuple[str, str, str]:
        """Return word, letter and question, the question as carelessly written as people write it."""
        rng, word = self._draw(i)
        letter = rng.choice(word if rng.random() < 0.9 else ascii_lowercase)
        template = rng.choice(QUESTIONS)
        if rng.random() < 0.3:
            template = template.lower()
        around_letter, around_word = rng.choice(("", "'", '"')), rng.choice(("", "'", '"'))
        question = template.format(
            letter=f"{around_letter}{letter}{around_letter}", word=f"{around_word}{word}{around_word}"
        )
        return word, letter, question + ("?" if rng.random() < 0.5 else "")


def read_words(path: Path, split: str) -> list[str]:
    """Return the words of `path` that belong to `split`; UserError when it has none."""
    try:
        lines = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a list of words ({error})") from None
    for number, word in enumerate(lines, start=1):
        if not word.isalpha():
            raise UserError(f"{path}: word {number}, {word!r}, is not made of letters only")
    words = sorted({word.lower() for word in lines})
    in_split = [w for w in words if (zlib.crc32(w.encode()) % 100 < TEST_PERCENT) == (split == "test")]
    if not in_split:
        raise UserError(f"{path}: none of its {len(words)} words falls into the {split} split; give a longer list")
    return in_split


def _count_by_hand(word: str, letter: str) -> str:
    # No space after the colon: "a" and " a" are different tokens, and the word is spelled with the former.
    lines, count = [], 0
    for position, character in enumerate(word, start=1):
        hit = character == letter
        count += hit
        lines.append(f"{position}:{character}" + (f" hit! count={count}" if hit else ""))
    spelled = f"{word}:{','.join(word)}"
    return f"Spelled out:\n{spelled}\n\nLooking for '{letter}':\n" + "\n".join(lines) + f"\n\nThat makes {count}."


def _conversation(question: str, answer: Any) -> Conversation:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
