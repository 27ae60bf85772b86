"""One engine step as flat tensors: what every paged context is made from.

Shapes: N packed tokens, sequence after sequence; S sequences; M blocks in the longest table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(slots=True, kw_only=True)
class PagedInputs:
    tokens: Tensor
    """(N,) ids."""
    positions: Tensor
    """(N,) position of each token in its sequence."""
    prev_tokens: Tensor
    """(N,) id before each token, -1 at the start of a sequence."""
    slots: Tensor
    """(N,) where the token's key and value go: block * block_size + offset."""
    block_tables: Tensor
    """(S, M), padded with the null block."""
    block_counts: Sequence[int]
    """(S,) blocks in each table, padding left out."""
    block_places: Tensor | None = None
    """(S, M) which of its sequence's blocks each one is, padding behind every token; None when every table begins at 0
    and has no gap."""
    query_lengths: Sequence[int]
    """(S,) tokens of each sequence among the N."""
    context_lengths: Sequence[int]
    """(S,) known tokens of each sequence once the step is done, the newest of which are among the N."""
    tree: Tensor | None = None
    """(N,) int64, where tokens were drafted: a drafted token sees the i-th drafted one of its sequence if bit i is set,
    and all known ones. Drafted tokens come behind the known ones of their sequence and lie in the slots after
    theirs, whatever their positions. A known token has no bit."""

    @property
    def lengths(self) -> Tensor:
        """(N,) length of each token's sequence up to the end of the step; for a drafted one, up to itself."""
        known = self._of_tokens(self.context_lengths)
        return known if self.tree is None else torch.maximum(known, self.positions + 1)

    @property
    def limits(self) -> Tensor:
        """(N,) how many known tokens of its sequence each one sees, windows apart."""
        if self.tree is None:
            return self.positions + 1
        return torch.where(self.tree == 0, self.positions + 1, self._of_tokens(self.context_lengths))

    def _of_tokens(self, values: Sequence[int]) -> Tensor:
        """(N,) the value of each token's sequence."""
        return torch.from_numpy(np.repeat(values, self.query_lengths)).to(self.positions.device)
