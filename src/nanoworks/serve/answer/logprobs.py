"""Log-probabilities in OpenAI's two forms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nanoworks.engine import Delta
from nanoworks.tokenizer import Tokenizer

IMPOSSIBLE = -9999.0  # OpenAI's log-probability of what cannot be: JSON has no minus infinity


def finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else IMPOSSIBLE


def chat_logprobs(delta: Delta, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Return an entry for each token that the model chose; what a tool forced on it has none."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        spelled = list(tokenizer.decode_bytes([token]))
        return {"token": tokenizer.decode([token]), "logprob": finite(logprob), "bytes": spelled}

    tops = delta.top_logprobs or [[]] * len(delta.token_ids)
    return [
        {**entry(token, logprob), "top_logprobs": [entry(*candidate) for candidate in top]}
        for token, logprob, sampled, top in zip(delta.token_ids, delta.logprobs, delta.mask, tops, strict=True)
        if sampled
    ]


class TextLogprobs:
    """The four lists of a completion: what `take` returns goes on where the last ones ended."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._offset = 0

    def take(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[float | None],
        tops: Sequence[Sequence[tuple[int, float]]],
    ) -> dict[str, list[Any]]:
        """Return the entries of further tokens. A token without a log-probability (None) has no others either."""
        names = [self._tokenizer.decode([token]) for token in tokens]
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            # Whole characters: a byte inside one (10xxxxxx) begins none.
            self._offset += sum(byte & 0xC0 != 0x80 for byte in self._tokenizer.decode_bytes([token]))
        likeliest: list[dict[str, float] | None] = []
        for name, logprob, top in zip(names, logprobs, tops, strict=True):
            if logprob is None:
                likeliest.append(None)
                continue
            found: dict[str, float] = {}
            for candidate, value in top:  # best first: of tokens that look alike the likeliest stays
                found.setdefault(self._tokenizer.decode([candidate]), finite(value))
            found.setdefault(name, finite(logprob))
            likeliest.append(found)
        return {
            "tokens": names,
            "token_logprobs": [None if logprob is None else finite(logprob) for logprob in logprobs],
            "top_logprobs": likeliest,
            "text_offset": offsets,
        }
