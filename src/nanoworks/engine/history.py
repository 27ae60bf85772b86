"""Which tokens a sample has had, kept between steps so that a step costs what its new tokens cost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class History:
    """The different tokens of one sample, and how often each is in its output."""

    def __init__(self, prompt_length: int) -> None:
        self._prompt_length = prompt_length
        self._length = 0
        self._place: dict[int, int] = {}
        self._ids = np.empty(256, dtype=np.int64)
        self._counts = np.zeros(256, dtype=np.float32)

    def follow(self, ids: Sequence[int]) -> None:
        """Take in what is new in `ids`, all known tokens of the sample."""
        for token in ids[self._length :]:
            place = self._place.setdefault(token, len(self._place))
            if place == len(self._ids):
                self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[place] = token
            self._counts[place] += self._length >= self._prompt_length
            self._length += 1

    def entries(self, drafted: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
        """Return the different tokens (int64) and their counts in the output (float32), with `drafted` behind it."""
        known = len(self._place)
        if not drafted:
            return self._ids[:known], self._counts[:known]
        new = [token for token in dict.fromkeys(drafted) if token not in self._place]
        place = {token: known + i for i, token in enumerate(new)}
        ids = np.concatenate([self._ids[:known], np.array(new, dtype=np.int64)])
        counts = np.concatenate([self._counts[:known], np.zeros(len(new), dtype=np.float32)])
        for token in drafted:
            counts[place[token] if token in place else self._place[token]] += 1
        return ids, counts
