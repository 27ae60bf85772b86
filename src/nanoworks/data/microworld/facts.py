"""Questions about the world: each of the 192 facts in eight phrasings, and multiple choice over the facts.

Every fact is stated in the training text. Held out are phrasings of a fact, and for multiple choice the
choices of a fact in their order.
"""

from __future__ import annotations

from random import Random

from nanoworks.data.microworld.example import Example, split_of
from nanoworks.data.microworld.world import FACTS, Fact

LETTERS = ("A", "B", "C", "D")


def _questions(fact: Fact) -> list[Example]:
    wrong = tuple(value for value in fact.property.values if value != fact.value)
    return [
        Example(f"fact/{question}", question, (("text", fact.state()),), fact.value, wrong)
        for question in fact.questions()
    ]


QUESTIONS = {fact: tuple(_questions(fact)) for fact in FACTS}


def draw_fact(rng: Random) -> Example:
    return rng.choice(QUESTIONS[rng.choice(FACTS)])


def draw_choice(rng: Random) -> Example:
    fact = rng.choice(FACTS)
    wrong = [value for value in fact.property.values if value != fact.value]
    choices = [fact.value, *rng.sample(wrong, len(LETTERS) - 1)]
    rng.shuffle(choices)
    # A held-out phrasing of the fact must not be trained on through its multiple choice.
    known = [e.question for e in QUESTIONS[fact] if split_of(e.key) == "train"]
    lines = "".join(f"- {choice}={letter}\n" for choice, letter in zip(choices, LETTERS, strict=True))
    question = (
        f"Multiple Choice question: {rng.choice(known)}\n{lines}\nRespond with the correct choice and its letter."
    )
    letter = LETTERS[choices.index(fact.value)]
    key = f"choice/{fact.property.noun}/{fact.owner}/{'/'.join(choices)}"
    return Example(key, question, (("text", f"It is {fact.value}={letter}"),), letter)
