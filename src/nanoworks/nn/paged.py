"""The paged KV cache and the context that lets the model's attention read and write it.

Tokens of many sequences come packed in one axis; each sequence has a table of the blocks that hold its keys
and values. One call serves prompt chunks, single decoded tokens and anything between. This is the reference
backend, in plain PyTorch for any device: sequences of similar size are gathered into one padded attention.

Shapes: N packed tokens, S sequences, M blocks a table, H query heads, K key/value heads, D features a head;
inside a group B sequences, T queries each, C cached tokens each (the two padded).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SMALL_TABLE = 16
"""Tables up to this many blocks are padded to each other without a thought."""


@dataclass(frozen=True)
class KVShape:
    """What one token of one model takes in the cache."""

    num_layers: int
    num_key_value_heads: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, model: nn.Module, device: torch.device) -> KVShape:
        """Run one token and see what reaches attention, so that a shard of a model gives its own share."""
        probe = _Probe(device)
        with torch.no_grad():
            model(torch.zeros(1, dtype=torch.long, device=device), probe)
        assert probe.seen, "the model never called ctx.attend"
        heads, head_dim, dtype = probe.seen[0]
        assert len(set(probe.seen.values())) == 1, "layers differ in their keys and values"
        return cls(max(probe.seen) + 1, heads, head_dim, dtype)

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_key_value_heads * self.head_dim * self.dtype.itemsize


class _Probe:
    def __init__(self, device: torch.device) -> None:
        self.positions = torch.zeros(1, dtype=torch.long, device=device)
        self.prev_tokens = self.positions - 1
        self.seen: dict[int, tuple[int, int, torch.dtype]] = {}

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, scale: float | None = None
    ) -> Tensor:
        self.seen[layer] = (k.size(-2), k.size(-1), k.dtype)
        return q


class KVCache:
    """Keys and values of `num_blocks` blocks of `block_size` tokens for every layer.

    Memory is not touched before a block is used; block 0 is zeros (see `engine.block_manager`).
    """

    def __init__(self, shape: KVShape, num_blocks: int, block_size: int, device: torch.device) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.data = torch.empty(
            (shape.num_layers, 2, num_blocks, block_size, shape.num_key_value_heads, shape.head_dim),
            dtype=shape.dtype,
            device=device,
        )
        self.data[:, :, 0] = 0
        self.layers = [(layer[0], layer[1]) for layer in self.data]
        """(keys, values) of each layer, both (num_blocks, block_size, K, D)."""

    def apply(self, copies: Sequence[tuple[int, int]], fresh: Sequence[int]) -> None:
        """Copy blocks (source, target), then zero the `fresh` ones.

        A fresh block is zeroed because attention multiplies what lies beyond a sequence's end by a weight of
        zero, and zero times another request's NaN would be NaN.
        """
        if copies:
            sources, targets = torch.tensor(copies, device=self.data.device).unbind(1)
            self.data[:, :, targets] = self.data[:, :, sources]
        if fresh:
            self.data.index_fill_(2, torch.tensor(fresh, device=self.data.device), 0)


class PagedContext:
    """The forward context of one engine step (see `nn.context.ForwardContext`).

    Args:
        positions, prev_tokens: (N,), as in every context.
        slots: (N,) index over num_blocks * block_size where each token's key and value are written.
        block_tables: (S, M) blocks of each sequence in order, padded with block 0.
        query_lengths: tokens of each sequence among the N, which come sequence after sequence.
        context_lengths: tokens of each sequence once these are written; the queries are its last ones.
    """

    def __init__(
        self,
        cache: KVCache,
        *,
        positions: Tensor,
        prev_tokens: Tensor,
        slots: Tensor,
        block_tables: Tensor,
        query_lengths: Sequence[int],
        context_lengths: Sequence[int],
    ) -> None:
        self.positions, self.prev_tokens = positions, prev_tokens
        self._cache, self._slots = cache, slots
        self._groups = _group(positions, block_tables, query_lengths, context_lengths, cache.block_size)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, scale: float | None = None
    ) -> Tensor:
        keys, values = self._cache.layers[layer]
        keys.flatten(0, 1).index_copy_(0, self._slots, k.to(keys.dtype))
        values.flatten(0, 1).index_copy_(0, self._slots, v.to(values.dtype))
        if len(self._groups) == 1 and self._groups[0].real is None:
            return self._groups[0].attend(q, keys, values, window=window, scale=scale)
        out = torch.empty_like(q)
        for group in self._groups:
            part = group.attend(q[group.rows], keys, values, window=window, scale=scale)
            if group.real is None:
                out[group.rows] = part
            else:
                out[group.rows[group.real]] = part[group.real]
        return out


class _Group:
    """Sequences whose attention runs as one padded batch.

    Args:
        rows: (B * T,) packed row of each query; padding repeats a sequence's last row.
        real: (n,) which of them are no padding; None when all are.
        positions: (B, T) of the queries.
        blocks: (B, M) of the keys.
    """

    def __init__(self, rows: Tensor, real: Tensor | None, positions: Tensor, blocks: Tensor, block_size: int) -> None:
        self.rows, self.real, self._positions = rows, real, positions
        self._blocks = blocks.reshape(-1)
        self._num_keys = blocks.size(1) * block_size
        self._masks: dict[tuple[int | None, torch.dtype], Tensor] = {}

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, *, window: int | None, scale: float | None) -> Tensor:
        """q (B * T, H, D) over the cached keys and values -> (B * T, H, D)."""
        (B, T), (H, D), K = self._positions.shape, q.shape[1:], keys.size(2)
        k, v = (
            pool.index_select(0, self._blocks).view(B, self._num_keys, K, D).transpose(1, 2).to(q.dtype)
            for pool in (keys, values)
        )
        q = q.view(B, T, K, H // K, D)
        mask = self._mask(window, q.dtype)
        if T == 1:
            # Query heads that share a key head stand in for query positions: no key is read or copied twice.
            out = F.scaled_dot_product_attention(q[:, 0], k, v, attn_mask=mask, scale=scale)
        else:
            heads = [
                F.scaled_dot_product_attention(head.transpose(1, 2), k, v, attn_mask=mask, scale=scale)
                for head in q.unbind(3)
            ]
            out = torch.stack(heads, dim=3).transpose(1, 2)  # from (B, K, T, H / K, D)
        return out.reshape(B * T, H, D)

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """(B, 1, T, C), added to the scores: 0 where the query sees the key, -inf elsewhere."""
        if (window, dtype) not in self._masks:
            distance = self._positions[:, :, None] - torch.arange(self._num_keys, device=self.rows.device)
            hidden = distance < 0
            if window is not None:
                hidden |= distance >= window
            mask = torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, float("-inf"))
            self._masks[window, dtype] = mask.unsqueeze(1)
        return self._masks[window, dtype]


def _group(
    positions: Tensor,
    block_tables: Tensor,
    query_lengths: Sequence[int],
    context_lengths: Sequence[int],
    block_size: int,
) -> list[_Group]:
    """Put together sequences that are padded at most to twice their queries and keys.

    All sequences with one query are one group, which is the whole of an ordinary decoding step.
    """
    members: dict[tuple[int, int], list[int]] = {}
    widths = [-(-length // block_size) for length in context_lengths]
    for i, (length, width) in enumerate(zip(query_lengths, widths, strict=True)):
        members.setdefault((length.bit_length(), max(width, _SMALL_TABLE).bit_length()), []).append(i)

    device = positions.device
    starts = list(accumulate(query_lengths, initial=0))
    groups = []
    for chosen in members.values():
        T = max(query_lengths[i] for i in chosen)
        padded = [[starts[i] + min(t, query_lengths[i] - 1) for t in range(T)] for i in chosen]
        rows = torch.tensor(padded, device=device)
        real = None
        if any(query_lengths[i] != T for i in chosen):
            lengths = torch.tensor([query_lengths[i] for i in chosen], device=device)
            real = (torch.arange(T, device=device) < lengths[:, None]).flatten().nonzero().squeeze(1)
        width = max(widths[i] for i in chosen)
        blocks = block_tables[torch.tensor(chosen, device=device), :width]
        groups.append(_Group(rows.flatten(), real, positions[rows], blocks, block_size))
    return groups
