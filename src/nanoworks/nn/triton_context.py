"""The forward context of the Triton kernel: the same cache and contract as `nn.paged`, on a GPU.

Nothing here waits for the GPU, and a step in which every sequence has one query copies nothing to it, so that step can
be captured in a CUDA graph. Shapes as in `nn.triton_attention`, which is imported on first use.
"""

from __future__ import annotations

from functools import cache as memoize
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nanoworks.nn.context import PLAIN, Attending
from nanoworks.nn.paged import KVCache, KVShape, PagedContext
from nanoworks.nn.paged_inputs import PagedInputs

if TYPE_CHECKING:
    from nanoworks.nn.triton_attention import Pages


class TritonContext:
    """The forward context of one engine step."""

    routing: dict[int, Any] | None = None

    def __init__(self, cache: KVCache, inputs: PagedInputs) -> None:
        from nanoworks.nn.triton_attention import Pages

        self.positions, self.prev_tokens, self.lengths = inputs.positions, inputs.prev_tokens, inputs.lengths
        self._cache, self._slots = cache, inputs.slots
        self._lengths = inputs.query_lengths
        cache.tokens.flatten().index_copy_(0, inputs.slots, inputs.tokens.to(cache.tokens.dtype))
        device = inputs.positions.device
        decoding = all(length == 1 for length in inputs.query_lengths)
        S = len(inputs.query_lengths)
        starts = torch.tensor(list(accumulate(inputs.query_lengths, initial=0)), dtype=torch.int32)
        self._pages: Pages = Pages(
            starts=torch.arange(S + 1, dtype=torch.int32, device=device) if decoding else starts.to(device),
            tables=inputs.block_tables.int().contiguous(),
            places=None if inputs.block_places is None else inputs.block_places.int().contiguous(),
            positions=inputs.positions.int(),
            limits=inputs.limits.int(),
            tree=inputs.tree,
            known=None
            if inputs.tree is None
            else torch.tensor(inputs.context_lengths, dtype=torch.int32, device=device),
        )
        self._tiles: dict[int, list[tuple[Tensor, bool]]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, how: Attending = PLAIN) -> Tensor:
        from nanoworks.nn import triton_attention

        keys, values = self._cache.layers[layer]
        keys.flatten(0, 1).index_copy_(0, self._slots, k.to(keys.dtype))
        values.flatten(0, 1).index_copy_(0, self._slots, v.to(values.dtype))
        q = q if q.stride(-1) == 1 else q.contiguous()
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        window = how.window
        ids = None if window is None or not window.token_ids else _ids(window.token_ids, q.device)
        for tiles, single in self._tiles_of(q.size(1) // keys.size(2)):
            triton_attention.attend(
                out,
                q,
                keys,
                values,
                self._pages,
                tiles,
                how,
                single=single,
                tokens=None if ids is None else self._cache.tokens,
                ids=ids,
            )
        return out

    def _tiles_of(self, group: int) -> list[tuple[Tensor, bool]]:
        """(T, 2) tiles of the sequences with one query, and of the others."""
        from nanoworks.nn.triton_attention import queries_of_a_tile

        if group not in self._tiles:
            device, size = self.positions.device, queries_of_a_tile(group)
            if all(length == 1 for length in self._lengths):
                each = torch.arange(len(self._lengths), dtype=torch.int32, device=device)
                self._tiles[group] = [(torch.stack([each, each], dim=1), True)]
            else:
                tiles: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
                row = 0
                for i, length in enumerate(self._lengths):
                    tiles[length == 1].extend((i, row + offset) for offset in range(0, length, size))
                    row += length
                made = [torch.tensor(t, dtype=torch.int32).to(device, non_blocking=True) if t else None for t in tiles]
                self._tiles[group] = [
                    (t, single) for t, single in zip(made, (False, True), strict=True) if t is not None
                ]
        return self._tiles[group]


@memoize
def _ids(token_ids: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(token_ids, dtype=torch.int32, device=device)


@torch.no_grad()
def why_not(shape: KVShape, group: int, device: torch.device) -> str:
    """Run the kernel on a few tokens of such heads; return why it cannot be used, "" if it can.

    Args:
        group: query heads that share a key head.
    """
    try:
        error = difference(shape, group, device)
    except Exception as e:  # what is missing or too small differs from machine to machine
        return f"{type(e).__name__}: {(str(e).strip() or '(no message)').splitlines()[0]}"
    tolerance = 1e-4 if shape.dtype == torch.float32 else 4e-2
    return "" if error < tolerance else f"the kernel's result is off by {error:.1e}"


def difference(shape: KVShape, group: int, device: torch.device, how: Attending = PLAIN) -> float:
    """Largest difference to the portable attention over a chunk of 20 tokens and one that is decoded behind 600."""
    K, D, size = shape.num_key_value_heads, shape.head_dim, 16
    one = KVShape(1, K, D, shape.dtype)
    generator = torch.Generator().manual_seed(0)
    inputs = PagedInputs(
        tokens=torch.zeros(21, dtype=torch.long, device=device),
        positions=torch.tensor([*range(20), 600], device=device),
        prev_tokens=torch.zeros(21, dtype=torch.long, device=device),
        slots=torch.tensor([*range(size, size + 20), 3 * size + 600], device=device),
        block_tables=torch.tensor([[1, 2, *[0] * 36], [*range(3, 41)]], device=device),
        block_counts=[2, 38],
        query_lengths=[20, 1],
        context_lengths=[20, 601],
    )
    q, k, v = (torch.randn((21, n, D), generator=generator).to(device, shape.dtype) for n in (K * group, K, K))
    filling = torch.randn((1, 2, 41, size, K, D), generator=generator)
    results = []
    for context in (PagedContext, TritonContext):
        cache = KVCache(one, 41, size, device)
        cache.data.copy_(filling)
        results.append(context(cache, inputs).attend(0, q, k, v, how).float())
    return float((results[0] - results[1]).abs().max().nan_to_num(float("inf")))
