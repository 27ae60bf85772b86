"""Plain-text documents for pretraining, by kind: about the world, and questions with their answers."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple

from nanoworks.data.microworld.arithmetic import draw_arithmetic
from nanoworks.data.microworld.example import Example, Split, draw_from
from nanoworks.data.microworld.facts import LETTERS, draw_choice, draw_fact
from nanoworks.data.microworld.identity import draw_identity
from nanoworks.data.microworld.spelling import draw_counting, draw_spelling
from nanoworks.data.microworld.world import FACTS, FACTS_OF, PEOPLE, PROPERTIES, TOWNS

KINDS: dict[str, Callable[[Random], Example]] = {
    "arithmetic": draw_arithmetic,
    "choice": draw_choice,
    "counting": draw_counting,
    "facts": draw_fact,
    "identity": draw_identity,
    "spelling": draw_spelling,
}


def article(rng: Random, split: Split) -> str:
    """All that is known about one to three towns or people, in any order and wording."""
    paragraphs = []
    for owner in rng.sample(tuple(FACTS_OF), rng.randint(1, 3)):
        facts = rng.sample(FACTS_OF[owner], len(FACTS_OF[owner]))
        sentences = " ".join(fact.state(rng.randrange(len(fact.property.statements))) for fact in facts)
        paragraphs.append(f"{owner}\n{sentences}\n")
    return "\n".join(paragraphs)


def listing(rng: Random, split: Split) -> str:
    """One property of several owners, a line each."""
    prop = rng.choice(PROPERTIES)
    facts = [fact for fact in FACTS if fact.property is prop]
    lines = "".join(f"- {fact.owner}: {fact.value}\n" for fact in rng.sample(facts, 8))
    return f"{prop.noun.capitalize()}\n{lines}"


def copies(rng: Random, split: Split) -> str:
    """A line of random words three times over. Repetition is what teaches a small model to copy from its context,
    on which reading a calculation's operands or a choice's letter depends; without it that comes very late."""
    line = "".join(f" {rng.choice(WORDS)}" for _ in range(rng.randint(8, 16)))
    return f"{line}\n" * 3


def register(rng: Random, split: Split) -> str:
    """Four words with a letter each, written like the choices of a question, then looked up again and again."""
    words = rng.sample(WORDS if rng.random() < 0.5 else rng.choice(PROPERTIES).values, len(LETTERS))
    lines = [f"- {word}={letter}\n" for word, letter in zip(words, LETTERS, strict=True)]
    return "".join(lines) + "".join(rng.choices(lines, k=12))


def questions(draw: Callable[[Random], Example], count: int) -> Callable[[Random, Split], str]:
    """Return a writer of documents with `count` questions and answers in the same form."""

    def write(rng: Random, split: Split) -> str:
        return "\n".join(draw_from(draw, rng, split).text() for _ in range(count))

    return write


WORDS = sorted({*TOWNS, *PEOPLE}.union(*(prop.values for prop in PROPERTIES)))


class DocumentKind(NamedTuple):
    write: Callable[[Random, Split], str]
    weight: float
    """Default share of the documents, relative to the other kinds."""


# Two documents of three are exercises in copying and looking up: with a third of that, the demo's model had not learnt
# the letters of a multiple choice by the end of its training.
DOCUMENTS: dict[str, DocumentKind] = {
    "article": DocumentKind(article, 2),
    "listing": DocumentKind(listing, 0.5),
    "copies": DocumentKind(copies, 8),
    "register": DocumentKind(register, 8),
    "arithmetic": DocumentKind(questions(draw_arithmetic, 3), 1),
    "choice": DocumentKind(questions(draw_choice, 2), 2),
    "counting": DocumentKind(questions(draw_counting, 3), 0.5),
    "facts": DocumentKind(questions(draw_fact, 4), 1.5),
    "identity": DocumentKind(questions(draw_identity, 2), 0.2),
    "spelling": DocumentKind(questions(draw_spelling, 4), 0.7),
}
