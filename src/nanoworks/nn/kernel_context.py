"""The paged KV cache and forward context of the CPU kernels: the same contract as `nn.paged`, without copying keys and
values together first.

Shapes: N packed tokens, S sequences, M blocks a table, H query heads, K key/value heads, D features a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nanoworks.nn.context import PLAIN, Attending, Window
from nanoworks.nn.packed import head_options
from nanoworks.nn.paged import KVShape
from nanoworks.nn.paged_inputs import PagedInputs

BLOCK_SIZE = 8
"""The kernels know no other: two blocks of keys fill a register, and few slots stay empty at a sequence's end."""

MAX_HEAD_DIM = 512


def suits(shape: KVShape, block_size: int) -> bool:
    """Whether the kernels can hold a cache of this shape."""
    return (
        block_size == BLOCK_SIZE
        and shape.dtype in (torch.float32, torch.bfloat16)
        and shape.head_dim % 4 == 0
        and shape.head_dim <= MAX_HEAD_DIM
    )


class KernelCache:
    """Keys and values in the kernels' order (see attention.h). `int8`: in bytes, with a scale for each token and head.

    Memory is not touched before a block is used; block 0 is zeros. `windows_name_tokens`: whether a layer's window
    shows tokens by their ids, which the cache must then know.
    """

    def __init__(self, shape: KVShape, num_blocks: int, *, int8: bool, windows_name_tokens: bool = True) -> None:
        self.block_size = BLOCK_SIZE
        heads = (shape.num_layers, 2, num_blocks, shape.num_key_value_heads)
        dtype = torch.uint8 if int8 else shape.dtype
        self.data = torch.empty((*heads, BLOCK_SIZE * shape.head_dim), dtype=dtype)
        self.scales = torch.empty((*heads, BLOCK_SIZE)) if int8 else None
        self._tokens = torch.zeros((num_blocks, BLOCK_SIZE), dtype=torch.int32) if windows_name_tokens else None
        self._shown: dict[tuple[int, ...], Tensor] = {}
        self._zero(torch.tensor([0]))
        self.handle = torch.classes.nanoworks.PagedCache(self.data, self.scales, shape.head_dim)

    def apply(
        self,
        copies: Sequence[tuple[int, int]],
        fresh: Sequence[int],
        moves: Sequence[tuple[int, int]] = (),
    ) -> None:
        """As `nn.paged.KVCache.apply`."""
        if moves:
            sources, targets = torch.tensor(moves, dtype=torch.int32).t().contiguous().unbind()
            torch.ops.nanoworks.move_slots(self.handle, sources, targets)
            for flags in self._flags():
                flags.flatten()[targets.long()] = flags.flatten()[sources.long()]
        if copies:
            sources, targets = torch.tensor(copies).unbind(1)
            for pool in (self.data, self.scales):
                if pool is not None:
                    pool[:, :, targets] = pool[:, :, sources]
            for flags in self._flags():
                flags[targets] = flags[sources]
        if fresh:
            self._zero(torch.tensor(fresh))

    def _flags(self) -> list[Tensor]:
        return [] if self._tokens is None else [self._tokens, *self._shown.values()]

    def _zero(self, blocks: Tensor) -> None:
        for pool in (self.data, self.scales):
            if pool is not None:
                pool.index_fill_(2, blocks, 0)

    def note(self, slots: Tensor, tokens: Tensor) -> None:
        """Remember which `tokens` go to `slots`, where windows ask for them."""
        if self._tokens is None:
            return
        self._tokens.flatten().index_copy_(0, slots, tokens.int())
        for token_ids, flags in self._shown.items():
            flags.flatten().index_copy_(0, slots, _among(tokens, token_ids))

    def shown(self, token_ids: tuple[int, ...]) -> Tensor:
        """(num_blocks, 8) of uint8: 1 for the tokens with one of these ids."""
        assert self._tokens is not None, "the cache was made without windows that name tokens"
        if token_ids not in self._shown:
            self._shown[token_ids] = _among(self._tokens, token_ids)
        return self._shown[token_ids]


def _among(tokens: Tensor, token_ids: tuple[int, ...]) -> Tensor:
    return torch.isin(tokens, torch.tensor(token_ids, dtype=tokens.dtype)).to(torch.uint8)


class KernelContext:
    """The forward context of one engine step."""

    routing: dict[int, Any] | None = None

    def __init__(self, cache: KernelCache, inputs: PagedInputs) -> None:
        self.cache = cache
        self.positions, self.prev_tokens, self.lengths = inputs.positions, inputs.prev_tokens, inputs.lengths
        cache.note(inputs.slots, inputs.tokens)
        self._arguments = (
            inputs.positions,
            inputs.slots,
            inputs.block_tables,
            inputs.block_places,
            inputs.block_counts,
            inputs.query_lengths,
            inputs.context_lengths,
            inputs.tree,
        )
        self._steps: dict[tuple[int, ...], Any] = {}

    def step(self, window: Window | None) -> Any:
        """The step as a layer with this window takes it (`PagedStep`)."""
        token_ids = () if window is None else window.token_ids
        if token_ids not in self._steps:
            shown = self.cache.shown(token_ids) if token_ids else None
            self._steps[token_ids] = torch.classes.nanoworks.PagedStep(*self._arguments, shown)
        return self._steps[token_ids]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, how: Attending = PLAIN) -> Tensor:
        options = head_options(q.size(-1), how)
        q, k, v = (t if t.stride(1) == t.size(2) and t.stride(2) == 1 else t.contiguous() for t in (q, k, v))
        return torch.ops.nanoworks.attend(q, k, v, None, None, self.step(how.window), self.cache.handle, layer, options)
