"""Spelling a word and counting a letter in it. Held out are words."""

from __future__ import annotations

from random import Random
from string import ascii_lowercase

from nanoworks.data.microworld.example import Example

ONSETS = ("b", "c", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w", "st", "tr", "br", "pl")
VOWELS = ("a", "e", "i", "o", "u")
CODAS = ("", "", "", "n", "r", "s", "l", "t")

SPELL = ("Spell the word {w}.", "How do you spell {w}?", "Please spell {w}.", "What are the letters of {w}?")
COUNT = ("How many {l} are in {w}?", "Count the letter {l} in {w}.", "How often does {l} occur in {w}?")


def draw_spelling(rng: Random) -> Example:
    word = _word(rng)
    letters = " ".join(word)
    return Example(f"word/{word}", rng.choice(SPELL).format(w=word), (("text", f"{word}: {letters}"),), letters)


def draw_counting(rng: Random) -> Example:
    word = _word(rng)
    letter = rng.choice(word if rng.random() < 0.8 else ascii_lowercase)
    count = str(word.count(letter))
    parts = (
        ("text", f"{word}: {' '.join(word)}\n"),
        ("python", f'"{word}".count("{letter}")'),
        ("python_output", count),
        ("text", f"#### {count}"),
    )
    return Example(f"word/{word}", rng.choice(COUNT).format(w=word, l=letter), parts, count)


def _word(rng: Random) -> str:
    """An invented word of two or three syllables: about 600,000 of two, so most are seen once if ever."""
    return "".join(rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(rng.choice((2, 2, 3))))
