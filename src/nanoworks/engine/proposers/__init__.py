"""Where drafted tokens come from: the text itself, a small model, or heads on the model.

A proposer guesses what follows the known tokens of a sequence; the engine verifies the guesses in its next step. It is
deterministic, so that verification keeps the distribution of plain decoding (see `engine.speculation`).
"""

from __future__ import annotations

from collections.abc import Sequence as ListOf
from typing import ClassVar, Protocol

from nanoworks.engine.sequence import Draft, Sequence


class Proposer(Protocol):
    needs_hidden: ClassVar[bool]
    """Whether `sequence.hidden` must be the hidden state of the row that the newest token was sampled from."""

    def propose(self, sequences: ListOf[Sequence], limits: ListOf[int]) -> list[Draft | None]:
        """Guess what follows `sequence.ids`, at most `limits[i]` tokens for each; None where there is no guess.

        Every sequence has all its tokens but the newest in the engine's cache.
        """
        ...

    def release(self, sequence: Sequence) -> None:
        """Forget a sequence that ended, known to the proposer or not."""
        ...


def chain(tokens: list[int]) -> Draft | None:
    """A draft without branches; None when it is empty."""
    return Draft(tokens, list(range(-1, len(tokens) - 1))) if tokens else None
