"""What attention needs to know about a batch, passed to the model explicitly.

The same model code serves training and paged inference because it never asks where keys and values
live: it hands q, k, v to `ctx.attend`. `DenseContext` is a rectangular batch without a cache;
`nn.paged.PagedContext` packs tokens of many requests over a paged KV cache.

Shapes: B rows, T tokens a row, H query heads, K key/value heads, D features a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoworks.nn import functional as NF


@dataclass(frozen=True)
class Window:
    """Which earlier tokens a query sees: the newest `size`, itself included, and the global ones, which never
    leave its sight (https://arxiv.org/abs/2004.05150; the first tokens as sinks: https://arxiv.org/abs/2309.17453)."""

    size: int
    first: int = 0
    """So many first tokens of a sequence are global."""
    token_ids: tuple[int, ...] = ()
    """And so is every token with one of these ids."""


class Attending(NamedTuple):
    """How a layer attends.

    Attributes:
        window: narrows what a query sees.
        scale: of the scores; None is D ** -0.5.
        softcap: c bounds scores to c * tanh(score / c).
        sinks: (H,) logits that take their share of the softmax and give nothing.
    """

    window: Window | None = None
    scale: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether the softmax is over the scores themselves, as every library's kernel has it."""
        return self.softcap is None and self.sinks is None


PLAIN = Attending()


class ForwardContext(Protocol):
    positions: Tensor
    """Position of each token in its sequence."""
    prev_tokens: Tensor
    """Id of the token before each token, -1 at the start of a sequence."""
    lengths: Tensor
    """Length of each token's sequence up to the last token of this call; broadcasts against `positions`."""
    routing: dict[int, Any] | None
    """Where layers with experts leave their `moe.Routing`, by layer; None when nobody will look."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, how: Attending = PLAIN) -> Tensor:
        """Causal attention of q (..., H, D) over k, v (..., K, D) and whatever the cache of `layer` holds; returns
        (..., H, D)."""
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
        if documents is not None:
            begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
            self.prev_tokens = self.prev_tokens.masked_fill(begins, -1)
        self.lengths = torch.full((), T, device=tokens.device)
        self.routing: dict[int, Any] | None = {}
        self.documents = documents
        self._tokens = tokens
        self._masks: dict[Window | None, Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, how: Attending = PLAIN) -> Tensor:
        window, scale, softcap, sinks = how
        if how.plain and self.documents is None and (window is None or window.size >= q.size(1)):
            return NF.causal_attention(q, k, v, scale=scale)
        if window not in self._masks:
            self._masks[window] = self.mask(window)
        return NF.masked_attention(q, k, v, self._masks[window], scale=scale, softcap=softcap, sinks=sinks)

    def mask(self, window: Window | None, queries: slice = slice(None)) -> Tensor:
        """Boolean (1 or B, 1, Q, T); True where the query (row) may see the key (column). Q counts the tokens in the
        slice `queries`: T, by default."""
        distance = self.positions[queries, None] - self.positions[None, :]
        mask = (distance >= 0)[None]
        if window is not None:
            near = (distance < window.size) | (self._places() < window.first)[:, None, :]
            if window.token_ids:
                ids = torch.tensor(window.token_ids, device=self._tokens.device)
                near = near | torch.isin(self._tokens, ids)[:, None, :]
            mask = mask & near
        if self.documents is not None:
            mask = mask & (self.documents[:, queries, None] == self.documents[:, None, :])
        return mask[:, None]

    def _places(self) -> Tensor:
        """(1 or B, T) position of each token in its own document."""
        if self.documents is None:
            return self.positions[None]
        begins = self.documents != F.pad(self.documents[:, :-1], (1, 0), value=-1)
        return self.positions - torch.where(begins, self.positions, 0).cummax(dim=1).values
