"""The invented world: 24 towns and 24 people with four properties each, 192 facts in all.

The world is a constant, drawn once from a fixed seed, so that every stage, task and test means the same one.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

TOWNS = (
    "Talmor", "Beldan", "Corvin", "Dunmere", "Elstow", "Farrin", "Galden", "Harwick", "Istra", "Jorvale", "Kelmar",
    "Lorvek", "Mirefield", "Norwen", "Oskel", "Penlow", "Quillon", "Ravik", "Selmere", "Thornby", "Umber",
    "Velden", "Wexley", "Yarrin",
)  # fmt: skip
PEOPLE = (
    "Ada", "Bruno", "Clara", "David", "Emma", "Felix", "Greta", "Hugo", "Ida", "Jonas", "Karin", "Leo", "Mira",
    "Nils", "Olga", "Pablo", "Rosa", "Simon", "Tara", "Uwe", "Vera", "Walter", "Xenia", "Zoe",
)  # fmt: skip


@dataclass(frozen=True)
class Property:
    """A property of towns or of people. In the texts {e} is the town or person and {v} the value."""

    noun: str
    owners: tuple[str, ...]
    values: tuple[str, ...]
    statements: tuple[str, ...]
    """Ways to state it; the first is the reference answer to every question."""
    questions: tuple[str, ...]


COMMON_QUESTIONS = (
    "What is the {noun} of {e}?",
    "Tell me the {noun} of {e}.",
    "Do you know the {noun} of {e}?",
    "Please name the {noun} of {e}.",
)

PROPERTIES = (
    Property(
        "flag colour",
        TOWNS,
        ("red", "blue", "green", "black", "white", "golden", "grey", "pink"),
        (
            "The flag of {e} is {v}.",
            "The town of {e} flies a {v} flag.",
            "In {e} the flag is {v}.",
            "A {v} flag waves over {e}.",
        ),
        (
            "What colour is the flag of {e}?",
            "Which colour does the flag of {e} have?",
            "In {e}, what colour is the flag?",
            "The flag of {e} is of which colour?",
        ),
    ),
    Property(
        "emblem",
        TOWNS,
        ("wolf", "bear", "owl", "fox", "hare", "swan", "stag", "crow"),
        (
            "The emblem of {e} is the {v}.",
            "The town of {e} has the {v} as its emblem.",
            "In {e} the emblem shows a {v}.",
            "The {v} is the emblem of {e}.",
        ),
        (
            "Which animal is the emblem of {e}?",
            "Which animal stands for {e}?",
            "In {e}, which animal is the emblem?",
            "The emblem of {e} shows which animal?",
        ),
    ),
    Property(
        "main trade",
        TOWNS,
        ("salt", "honey", "bread", "cheese", "fish", "wool", "glass", "timber"),
        (
            "The main trade of {e} is {v}.",
            "The town of {e} lives on {v}.",
            "In {e} people trade {v}.",
            "Most {v} comes from {e}.",
        ),
        (
            "What do people trade in {e}?",
            "What does {e} live on?",
            "In {e}, what do people trade?",
            "The people of {e} trade what?",
        ),
    ),
    Property(
        "landscape",
        TOWNS,
        ("forest", "desert", "marsh", "valley", "island", "coast", "plain", "hills"),
        (
            "The landscape of {e} is {v}.",
            "The town of {e} lies amid {v}.",
            "In {e} you see {v} all around.",
            "Much {v} surrounds {e}.",
        ),
        (
            "What landscape surrounds {e}?",
            "Where does {e} lie?",
            "In {e}, what landscape do you see?",
            "The town of {e} lies in which landscape?",
        ),
    ),
    Property(
        "home town",
        PEOPLE,
        TOWNS,
        (
            "The home town of {e} is {v}.",
            "{e} lives in {v}.",
            "You can visit {e} in {v}.",
            "The house of {e} stands in {v}.",
        ),
        (
            "Where does {e} live?",
            "In which town does {e} live?",
            "Which town does {e} call home?",
            "{e} lives in which town?",
        ),
    ),
    Property(
        "job",
        PEOPLE,
        ("baker", "smith", "sailor", "teacher", "farmer", "doctor", "painter", "miller"),
        ("The job of {e} is {v}.", "{e} works as a {v}.", "People know {e} as a {v}.", "{e} earns a living as a {v}."),
        ("What does {e} work as?", "What work does {e} do?", "How does {e} earn a living?", "{e} works as what?"),
    ),
    Property(
        "pet",
        PEOPLE,
        ("cat", "dog", "parrot", "goat", "pony", "mouse", "lizard", "goose"),
        ("The pet of {e} is a {v}.", "{e} keeps a {v}.", "A {v} lives with {e}.", "{e} feeds a {v} every day."),
        (
            "Which pet does {e} keep?",
            "What animal lives with {e}?",
            "Which animal does {e} feed?",
            "{e} keeps which animal?",
        ),
    ),
    Property(
        "instrument",
        PEOPLE,
        ("flute", "drum", "harp", "violin", "horn", "organ", "guitar", "piano"),
        (
            "The instrument of {e} is the {v}.",
            "{e} plays the {v}.",
            "{e} practises the {v}.",
            "You can hear {e} play the {v}.",
        ),
        (
            "What does {e} play?",
            "Which instrument does {e} play?",
            "What can you hear {e} play?",
            "{e} plays which instrument?",
        ),
    ),
)


@dataclass(frozen=True)
class Fact:
    property: Property
    owner: str
    value: str

    def state(self, way: int = 0) -> str:
        text = self.property.statements[way].format(e=self.owner, v=self.value)
        return text[0].upper() + text[1:]

    def questions(self) -> tuple[str, ...]:
        forms = COMMON_QUESTIONS + self.property.questions
        return tuple(form.format(e=self.owner, noun=self.property.noun) for form in forms)


def _facts() -> tuple[Fact, ...]:
    rng = Random(20)
    facts = []
    for prop in PROPERTIES:
        values = [prop.values[i % len(prop.values)] for i in range(len(prop.owners))]
        rng.shuffle(values)  # every value equally often, so that guessing the commonest gains nothing
        facts += [Fact(prop, owner, value) for owner, value in zip(prop.owners, values, strict=True)]
    return tuple(facts)


FACTS = _facts()
FACTS_OF = {owner: tuple(fact for fact in FACTS if fact.owner == owner) for owner in (*TOWNS, *PEOPLE)}
