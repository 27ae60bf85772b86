"""What attention needs to know about a batch, passed to the model explicitly.

The same model code serves training and paged inference because it never asks where keys and values
live: it hands q, k, v to `ctx.attend`. `DenseContext` is a rectangular batch without a cache;
`nn.paged.PagedContext` packs tokens of many requests over a paged KV cache.

Shapes: B rows, T tokens a row, H query heads, K key/value heads, D features a head.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoworks.nn import functional as NF


class ForwardContext(Protocol):
    positions: Tensor
    """Position of each token in its sequence."""
    prev_tokens: Tensor
    """Id of the token before each token, -1 at the start of a sequence."""

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        window: int | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Causal attention of q (..., H, D) over k, v (..., K, D) and whatever the cache of `layer` holds.

        `window` is the number of keys a query sees, itself included; None is all of them. `scale` defaults
        to D ** -0.5. Returns (..., H, D).
        """
        ...


class DenseContext:
    """A rectangular batch of sequences that each start at position 0; no cache.

    Args:
        tokens: (B, T) ids.
        documents: (B, T) index of the document each token belongs to; attention then stays inside a
            document. None lets a token see the whole row before it (nanochat's choice).
    """

    def __init__(self, tokens: Tensor, *, documents: Tensor | None = None) -> None:
        T = tokens.size(-1)
        self.positions = torch.arange(T, device=tokens.device)
        self.prev_tokens = F.pad(tokens[..., :-1], (1, 0), value=-1)
        self.documents = documents
        self._masks: dict[int | None, Tensor] = {}

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        window: int | None = None,
        scale: float | None = None,
    ) -> Tensor:
        if self.documents is None and (window is None or window >= q.size(1)):
            return NF.causal_attention(q, k, v, scale=scale)
        if window not in self._masks:
            self._masks[window] = self._mask(window)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=self._masks[window],
            scale=scale,
            enable_gqa=q.size(2) != k.size(2),
        )
        return out.transpose(1, 2)

    def _mask(self, window: int | None) -> Tensor:
        """Boolean (1 or B, 1, T, T); True where the query (row) may see the key (column)."""
        distance = self.positions[:, None] - self.positions[None, :]
        mask = distance >= 0
        if window is not None:
            mask = mask & (distance < window)
        mask = mask[None, None]
        if self.documents is not None:
            mask = mask & (self.documents[:, None, :, None] == self.documents[:, None, None, :])
        return mask
