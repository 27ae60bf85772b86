"""Split an answer into its parts while it streams: text, calculator expressions, calculator results.

The engine's text shows the tool tokens: `<|python_start|>12*7<|python_end|><|output_start|>84<|output_end|>`.
A part is `{"type": "text" | "python" | "python_output", "text": str}`, the form in which a conversation
stores it.
"""

from __future__ import annotations

import re

Piece = dict[str, str]

# Each mark and the type of what follows it.
MARKS = {
    "<|python_start|>": "python",
    "<|python_end|>": "text",
    "<|output_start|>": "python_output",
    "<|output_end|>": "text",
}
_MARK = re.compile("|".join(re.escape(mark) for mark in MARKS))


class PartSplitter:
    """Feed it an answer bit by bit; it returns the same text without the marks, each piece with its type."""

    def __init__(self) -> None:
        self._type = "text"
        self._held = ""  # the end of what was fed, while it may still grow into a mark

    def feed(self, text: str) -> list[Piece]:
        """Return the pieces that `text` completes, none of them empty."""
        text = self._held + text
        end = len(text) - _length_of_possible_mark(text)
        pieces: list[Piece] = []
        start = 0
        for match in _MARK.finditer(text):
            self._emit(pieces, text[start : match.start()])
            self._type = MARKS[match.group()]
            start = match.end()
        self._emit(pieces, text[start:end])
        self._held = text[end:]
        return pieces

    def finish(self) -> list[Piece]:
        """Return what was held back: the answer ended in something that only looked like a mark."""
        pieces: list[Piece] = []
        self._emit(pieces, self._held)
        self._held = ""
        return pieces

    def _emit(self, pieces: list[Piece], text: str) -> None:
        if text:
            pieces.append({"type": self._type, "text": text})


def _length_of_possible_mark(text: str) -> int:
    """Return how many characters at the end of `text` are the beginning of a mark."""
    start = text.rfind("<")
    tail = text[start:] if start >= 0 else ""
    return len(tail) if tail not in MARKS and any(mark.startswith(tail) for mark in MARKS) else 0


def add_piece(parts: list[Piece], piece: Piece) -> None:
    """Append `piece` to `parts`, joining it to the last part when both are of one type."""
    if parts and parts[-1]["type"] == piece["type"]:
        parts[-1]["text"] += piece["text"]
    else:
        parts.append(dict(piece))
