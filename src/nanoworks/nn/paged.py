"""The paged KV cache and the context that lets the model's attention read and write it.

Tokens of many sequences come packed in one axis; each sequence has a table of the blocks that hold its keys
and values, and need not have those that no window shows any more. One call serves prompt chunks, single decoded
tokens and anything between. This is the reference backend, in plain PyTorch for any device: sequences of similar
size are gathered into one padded attention.

Shapes: N packed tokens, S sequences, M blocks a table, H query heads, K key/value heads, D features a head;
inside a group B sequences, T queries each, C cached tokens each (the two padded).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoworks.nn import functional as NF
from nanoworks.nn.context import PLAIN, Attending, Window
from nanoworks.nn.paged_inputs import PagedInputs

_SMALL_TABLE = 16
"""Tables up to this many blocks are padded to each other without a thought."""


@dataclass(frozen=True)
class KVShape:
    """What one token of one model takes in the cache."""

    num_layers: int
    num_key_value_heads: int
    head_dim: int
    dtype: torch.dtype
    window: Window | None = None
    """What at least one layer sees; no layer sees more. None when a layer sees everything."""

    @classmethod
    def of(cls, model: nn.Module, device: torch.device) -> KVShape:
        """Run one token and see what reaches attention, so that a shard of a model gives its own share."""
        probe = _Probe(device)
        with torch.no_grad():
            model(torch.zeros(1, dtype=torch.long, device=device), probe)
        assert probe.seen, "the model never called ctx.attend"
        heads, head_dim, dtype = probe.seen[0]
        assert len(set(probe.seen.values())) == 1, "layers differ in their keys and values"
        return cls(max(probe.seen) + 1, heads, head_dim, dtype, _union(list(probe.windows.values())))

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_key_value_heads * self.head_dim * self.dtype.itemsize

    @property
    def bytes_per_token_int8(self) -> int:
        """With a byte for each value and a float32 scale for each head."""
        return 2 * self.num_layers * self.num_key_value_heads * (self.head_dim + 4)


def _union(windows: list[Window | None]) -> Window | None:
    """A window that shows what any of `windows` shows."""
    bounded = [window for window in windows if window is not None]
    if len(bounded) < len(windows):
        return None
    return Window(
        size=max(window.size for window in bounded),
        first=max(window.first for window in bounded),
        token_ids=tuple(sorted({token for window in bounded for token in window.token_ids})),
    )


class _Probe:
    routing: dict[int, Any] | None = None

    def __init__(self, device: torch.device) -> None:
        self.positions = torch.zeros(1, dtype=torch.long, device=device)
        self.prev_tokens = self.positions - 1
        self.lengths = self.positions + 1
        self.seen: dict[int, tuple[int, int, torch.dtype]] = {}
        self.windows: dict[int, Window | None] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, how: Attending = PLAIN) -> Tensor:
        self.seen[layer] = (k.size(-2), k.size(-1), k.dtype)
        self.windows[layer] = how.window
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
        self.tokens = torch.empty((num_blocks, block_size), dtype=torch.int32, device=device)
        """Id of the token in each slot, by which a window knows its global tokens."""
        self.layers = [(layer[0], layer[1]) for layer in self.data]
        """(keys, values) of each layer, both (num_blocks, block_size, K, D)."""

    def apply(
        self, copies: Sequence[tuple[int, int]], fresh: Sequence[int], moves: Sequence[tuple[int, int]] = ()
    ) -> None:
        """Copy tokens from slot to slot (`moves`), then blocks (source, target), then zero the `fresh` ones.

        A fresh block is zeroed because attention multiplies what lies beyond a sequence's end by a weight of
        zero, and zero times another request's NaN would be NaN.
        """
        if moves:
            sources, targets = torch.tensor(moves, device=self.data.device).unbind(1)
            slots = self.data.flatten(2, 3)
            slots[:, :, targets] = slots[:, :, sources]
            tokens = self.tokens.flatten()
            tokens[targets] = tokens[sources]
        if copies:
            sources, targets = torch.tensor(copies, device=self.data.device).unbind(1)
            self.data[:, :, targets] = self.data[:, :, sources]
            self.tokens[targets] = self.tokens[sources]
        if fresh:
            self.data.index_fill_(2, torch.tensor(fresh, device=self.data.device), 0)


class PagedContext:
    """The forward context of one engine step (see `nn.context.ForwardContext`)."""

    routing: dict[int, Any] | None = None

    def __init__(self, cache: KVCache, inputs: PagedInputs) -> None:
        self.positions, self.prev_tokens, self.lengths = inputs.positions, inputs.prev_tokens, inputs.lengths
        self._cache, self._slots = cache, inputs.slots
        cache.tokens.flatten().index_copy_(0, inputs.slots, inputs.tokens.to(cache.tokens.dtype))
        self._groups = _group(cache, inputs)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, how: Attending = PLAIN) -> Tensor:
        keys, values = self._cache.layers[layer]
        keys.flatten(0, 1).index_copy_(0, self._slots, k.to(keys.dtype))
        values.flatten(0, 1).index_copy_(0, self._slots, v.to(values.dtype))
        if len(self._groups) == 1 and self._groups[0].real is None:
            return self._groups[0].attend(q, keys, values, how)
        out = torch.empty_like(q)
        for group in self._groups:
            part = group.attend(q[group.rows], keys, values, how)
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
        positions, limits: (B, T) of the queries.
        tree: (B, T) or None, and (B,) places where drafted tokens begin.
        blocks, places: (B, M) of the keys, as in `PagedInputs`.
    """

    def __init__(
        self,
        cache: KVCache,
        rows: Tensor,
        real: Tensor | None,
        positions: Tensor,
        limits: Tensor,
        tree: tuple[Tensor, Tensor] | None,
        blocks: Tensor,
        places: Tensor | None,
    ) -> None:
        self.rows, self.real = rows, real
        self._cache, self._positions, self._blocks = cache, positions, blocks.reshape(-1)
        self._limits, self._tree = limits, tree
        offsets = torch.arange(cache.block_size, device=rows.device)
        if places is None:
            places = torch.arange(blocks.size(1), device=rows.device)
        self._key_positions = (places.unsqueeze(-1) * cache.block_size + offsets).flatten(-2)  # (B, C) or (C,)
        self._masks: dict[Window | None, Tensor] = {}
        self._biases: dict[tuple[Window | None, torch.dtype], Tensor] = {}

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, how: Attending) -> Tensor:
        """q (B * T, H, D) over the cached keys and values -> (B * T, H, D)."""
        (B, T), (H, D), K = self._positions.shape, q.shape[1:], keys.size(2)
        k, v = (pool.index_select(0, self._blocks).view(B, -1, K, D).to(q.dtype) for pool in (keys, values))
        if not how.plain:
            mask = self._mask(how.window)
            out = NF.masked_attention(
                q.view(B, T, H, D), k, v, mask, scale=how.scale, softcap=how.softcap, sinks=how.sinks
            )
            return out.reshape(B * T, H, D)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        q = q.view(B, T, K, H // K, D)
        bias = self._bias(how.window, q.dtype)
        if T == 1:
            # Query heads that share a key head stand in for query positions: no key is read or copied twice.
            out = F.scaled_dot_product_attention(q[:, 0], k, v, attn_mask=bias, scale=how.scale)
        else:
            heads = [
                F.scaled_dot_product_attention(head.transpose(1, 2), k, v, attn_mask=bias, scale=how.scale)
                for head in q.unbind(3)
            ]
            out = torch.stack(heads, dim=3).transpose(1, 2)  # from (B, K, T, H / K, D)
        return out.reshape(B * T, H, D)

    def _bias(self, window: Window | None, dtype: torch.dtype) -> Tensor:
        """(B, 1, T, C), added to the scores: 0 where the query sees the key, -inf elsewhere."""
        if (window, dtype) not in self._biases:
            mask = self._mask(window)
            self._biases[window, dtype] = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))
        return self._biases[window, dtype]

    def _mask(self, window: Window | None) -> Tensor:
        """Boolean (B, 1, T, C); True where the query sees the key."""
        if window not in self._masks:
            key_positions = self._key_positions.unsqueeze(-2)
            mask = key_positions < self._limits.unsqueeze(-1)
            if window is not None:
                near = self._positions.unsqueeze(-1) - key_positions < window.size
                if window.first:
                    near |= key_positions < window.first
                if window.token_ids:
                    tokens = self._cache.tokens.index_select(0, self._blocks).view(len(near), 1, -1)
                    near |= torch.isin(tokens, torch.tensor(window.token_ids, dtype=tokens.dtype, device=tokens.device))
                mask &= near
            if self._tree is not None:
                bits, begins = self._tree
                nth = key_positions - begins.view(-1, 1, 1)  # of the drafted tokens
                drafted = (nth >= 0) & (nth < 64)
                mask = mask | (drafted & (bits.unsqueeze(-1) >> nth.clamp(0, 63) & 1).bool())
            self._masks[window] = mask.unsqueeze(1)
        return self._masks[window]


def _group(cache: KVCache, inputs: PagedInputs) -> list[_Group]:
    """Put together sequences that are padded at most to twice their queries and keys.

    All sequences with one query are one group, which is the whole of an ordinary decoding step.
    """
    query_lengths, block_counts = inputs.query_lengths, inputs.block_counts
    members: dict[tuple[int, int], list[int]] = {}
    for i, (length, width) in enumerate(zip(query_lengths, block_counts, strict=True)):
        members.setdefault((length.bit_length(), max(width, _SMALL_TABLE).bit_length()), []).append(i)

    device = inputs.positions.device
    starts = list(accumulate(query_lengths, initial=0))
    limits = inputs.limits
    groups = []
    for chosen in members.values():
        T = max(query_lengths[i] for i in chosen)
        padded = [[starts[i] + min(t, query_lengths[i] - 1) for t in range(T)] for i in chosen]
        rows = torch.tensor(padded, device=device)
        real = None
        if any(query_lengths[i] != T for i in chosen):
            lengths = torch.tensor([query_lengths[i] for i in chosen], device=device)
            real = (torch.arange(T, device=device) < lengths[:, None]).flatten().nonzero().squeeze(1)
        width = max(block_counts[i] for i in chosen)
        select = torch.tensor(chosen, device=device)
        tree = None
        if inputs.tree is not None:
            begins = torch.tensor([inputs.context_lengths[i] for i in chosen], device=device)
            tree = (inputs.tree[rows], begins)
        places = None if inputs.block_places is None else inputs.block_places[select, :width]
        groups.append(
            _Group(
                cache,
                rows.flatten(),
                real,
                inputs.positions[rows],
                limits[rows],
                tree,
                inputs.block_tables[select, :width],
                places,
            )
        )
    return groups
