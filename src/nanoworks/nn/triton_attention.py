"""Attention over the paged cache of `nn.paged` as a Triton kernel: keys and values are read where they lie, once.

One program takes a tile of queries of one sequence, all query heads of one key head, and walks over the keys with an
online softmax (https://arxiv.org/abs/2205.14135) in float32. A sequence with one query would be one program a key head,
too few for a GPU when sequences are few: its keys are then cut in `SPLITS` and the parts merged by a second kernel
(https://crfm.stanford.edu/2023/10/12/flashdecoding.html).

With TRITON_INTERPRET=1, set before Triton is imported, all this runs on a CPU: slowly, for tests.

Shapes: N packed tokens, S sequences, M blocks a table, T tiles, H query heads, K key/value heads, D features a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoworks.nn.context import Attending

CHUNK_ROWS = 64
"""Queries times heads in a tile of a chunk."""
MAX_SPLITS = 32


@triton.jit(do_not_specialize=["width", "window", "first"])
def _attend(  # type: ignore[no-untyped-def]
    out,  # (N, H, D), or with SPLITS > 1 (T, H, SPLITS, D) float32, not yet divided by the sums
    maxima,  # (T, H, SPLITS) float32, with SPLITS > 1
    sums,  # the same
    q,  # (N, H, D) with strides q_row, q_head, 1
    keys,  # (blocks, BLOCK_SIZE, K, D)
    values,
    tiles,  # (T, 2) sequence and first row of each
    starts,  # (S + 1,)
    tables,  # (S, M)
    places,  # (S, M), with SCATTERED
    positions,  # (N,)
    limits,  # (N,)
    tree,  # (N,) int64, with TREE
    known,  # (S,), with TREE
    tokens,  # (blocks, BLOCK_SIZE), with NUM_IDS
    ids,  # (NUM_IDS,)
    sinks,  # (H,), with SINKS
    scale,
    softcap,
    window,
    first,
    q_row,
    q_head,
    width,  # M
    GROUP: tl.constexpr,  # query heads of a key head
    NUM_KEY_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,  # queries times HEADS
    HEADS: tl.constexpr,  # GROUP, rounded up
    KEYS: tl.constexpr,  # that are taken at once
    PADDED_D: tl.constexpr,  # D, rounded up
    SPLITS: tl.constexpr,
    SCATTERED: tl.constexpr,
    TREE: tl.constexpr,
    WINDOWED: tl.constexpr,
    NUM_IDS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
):
    LOG2E: tl.constexpr = 1.4426950408889634
    tile, key_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence = tl.load(tiles + 2 * tile)
    first_row = tl.load(tiles + 2 * tile + 1)
    last_row = tl.load(starts + sequence + 1)
    r = tl.arange(0, ROWS)
    row = first_row + r // HEADS
    head = key_head * GROUP + r % HEADS
    real = (row < last_row) & (r % HEADS < GROUP)
    d = tl.arange(0, PADDED_D)
    queries = tl.load(
        q + row.to(tl.int64)[:, None] * q_row + head[:, None] * q_head + d[None, :],
        mask=real[:, None] & (d < D)[None, :],
        other=0.0,
    )
    limit = tl.load(limits + row, mask=real, other=0)
    position = tl.load(positions + row, mask=real, other=0)

    # What is to be seen lies before `end`, and between `head_tiles` and `head_tiles + skipped` there is nothing.
    end = width * BLOCK_SIZE
    head_tiles = 0
    skipped = 0
    if TREE:
        bits = tl.load(tree + row, mask=real, other=0)
        num_known = tl.load(known + sequence)
    if not SCATTERED:
        end = tl.minimum(end, num_known + 64 if TREE else tl.max(limit, axis=0))
        if WINDOWED and NUM_IDS == 0:
            oldest = tl.min(tl.where(real, position, 2147483647), axis=0) - window + 1
            head_tiles = (first + KEYS - 1) // KEYS
            skipped = tl.maximum(tl.maximum(oldest, 0) // KEYS - head_tiles, 0)
    num_tiles = (end + KEYS - 1) // KEYS - skipped
    share = (num_tiles + SPLITS - 1) // SPLITS

    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if SINKS:  # counted with the first part
        sink = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) * LOG2E
        maximum = tl.where(split == 0, sink, maximum)
        total = tl.where(split == 0, 1.0, total)
    sum_of_values = tl.zeros((ROWS, PADDED_D), tl.float32)

    for i in range(split * share, tl.minimum((split + 1) * share, num_tiles)):
        nth = (i + tl.where(i < head_tiles, 0, skipped)) * KEYS + tl.arange(0, KEYS)
        inside = nth < end
        block = tl.load(tables + sequence * width + nth // BLOCK_SIZE, mask=inside, other=0)
        slot = block.to(tl.int64) * BLOCK_SIZE + nth % BLOCK_SIZE
        at = nth
        if SCATTERED:
            place = tl.load(places + sequence * width + nth // BLOCK_SIZE, mask=inside, other=0)
            at = place * BLOCK_SIZE + nth % BLOCK_SIZE
        offset = (slot * NUM_KEY_HEADS + key_head) * D
        k = tl.load(keys + offset[None, :] + d[:, None], mask=inside[None, :] & (d < D)[:, None], other=0.0)
        scores = tl.dot(queries, k.to(queries.dtype), input_precision="ieee") * scale
        if SOFTCAP:  # c * tanh(x / c)
            scores = softcap * (1 - 2 / (tl.exp(2 * scores / softcap) + 1))
        seen = at[None, :] < limit[:, None]
        if WINDOWED:
            near = (position[:, None] - at[None, :] < window) | (at < first)[None, :]
            if NUM_IDS > 0:
                token = tl.load(tokens + slot, mask=inside, other=-1)
                for n in tl.static_range(NUM_IDS):
                    near = near | (token == tl.load(ids + n))[None, :]
            seen = seen & near
        if TREE:
            drafted = at - num_known
            bit = (bits[:, None] >> tl.minimum(tl.maximum(drafted, 0), 63).to(tl.int64)[None, :]) & 1
            seen = seen | ((bit == 1) & ((drafted >= 0) & (drafted < 64))[None, :])
        scores = tl.where(seen & inside[None, :], scores * LOG2E, float("-inf"))

        higher = tl.maximum(maximum, tl.max(scores, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
        p = tl.exp2(scores - base[:, None])
        fade = tl.exp2(maximum - base)
        total = total * fade + tl.sum(p, axis=1)
        v = tl.load(values + offset[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
        part = tl.dot(p.to(queries.dtype), v.to(queries.dtype), input_precision="ieee")
        sum_of_values = sum_of_values * fade[:, None] + part
        maximum = higher

    wanted = real[:, None] & (d < D)[None, :]
    if SPLITS == 1:
        result = sum_of_values / tl.where(total == 0, 1.0, total)[:, None]
        to = (row.to(tl.int64) * (NUM_KEY_HEADS * GROUP) + head) * D
        tl.store(out + to[:, None] + d[None, :], result.to(out.dtype.element_ty), mask=wanted)
    else:
        to = (tile * (NUM_KEY_HEADS * GROUP) + head).to(tl.int64) * SPLITS + split
        tl.store(out + to[:, None] * D + d[None, :], sum_of_values, mask=wanted)
        tl.store(maxima + to, maximum, mask=real)
        tl.store(sums + to, total, mask=real)


@triton.jit
def _merge(  # type: ignore[no-untyped-def]
    out,  # (N, H, D)
    parts,  # (T, H, SPLITS, D)
    maxima,  # (T, H, SPLITS)
    sums,
    tiles,  # (T, 2)
    NUM_HEADS: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    SPLITS: tl.constexpr,
):
    tile, head = tl.program_id(0), tl.program_id(1)
    s, d = tl.arange(0, SPLITS), tl.arange(0, PADDED_D)
    source = (tile * NUM_HEADS + head).to(tl.int64) * SPLITS + s
    maximum = tl.load(maxima + source)
    highest = tl.max(maximum, axis=0)
    weight = tl.exp2(maximum - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(weight * tl.load(sums + source), axis=0)
    part = tl.load(parts + source[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
    result = tl.sum(part * weight[:, None], axis=0) / tl.where(total == 0, 1.0, total)
    to = (tl.load(tiles + 2 * tile + 1).to(tl.int64) * NUM_HEADS + head) * D
    tl.store(out + to + d, result.to(out.dtype.element_ty), mask=d < D)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pages:
    """One step's tokens and where their sequences lie in the cache; int32 but for `tree`. As in `PagedInputs`."""

    starts: Tensor
    """(S + 1,) row of each sequence's first query."""
    tables: Tensor
    """(S, M), dense"""
    places: Tensor | None
    positions: Tensor
    limits: Tensor
    tree: Tensor | None
    known: Tensor | None
    """(S,) known tokens of each sequence, with `tree`."""


def attend(
    out: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Pages,
    tiles: Tensor,
    how: Attending,
    *,
    single: bool,
    tokens: Tensor | None = None,
    ids: Tensor | None = None,
) -> None:
    """Write to `out` (N, H, D) what the rows of some `tiles` see.

    Args:
        q: (N, H, D), its last dimension dense.
        keys, values: (blocks, block_size, K, D), dense.
        tiles: (T, 2) int32, a sequence and a row of it: of one query each if `single`, else of `queries_of_a_tile`.
        tokens, ids: (blocks, block_size) token in each slot, and those of the window's `token_ids`, if any.
    """
    window, scale, softcap, sinks = how
    (_, H, D), K, block_size = q.shape, keys.size(2), keys.size(1)
    heads, padded = triton.next_power_of_2(H // K), max(16, triton.next_power_of_2(D))
    T = tiles.size(0)
    splits = num_splits(T * K, pages.tables.size(1) * block_size, _processors(q.device)) if single else 1
    target, maxima, sums = out, out, out
    if splits > 1:
        target = torch.empty((T, H, splits, D), dtype=torch.float32, device=q.device)
        maxima, sums = torch.empty((2, T, H, splits), dtype=torch.float32, device=q.device)
    wide = padded * q.element_size() > 256  # bytes of a key: smaller tiles leave room for the next ones
    _attend[(T, K, splits)](
        target,
        maxima,
        sums,
        q,
        keys,
        values,
        tiles,
        pages.starts,
        pages.tables,
        pages.places,
        pages.positions,
        pages.limits,
        pages.tree,
        pages.known,
        tokens,
        ids,
        sinks,
        D**-0.5 if scale is None else scale,
        softcap or 1.0,
        0 if window is None else window.size,
        0 if window is None else window.first,
        q.stride(0),
        q.stride(1),
        pages.tables.size(1),
        GROUP=H // K,
        NUM_KEY_HEADS=K,
        D=D,
        BLOCK_SIZE=block_size,
        ROWS=max(16, heads) if single else max(CHUNK_ROWS, heads),
        HEADS=heads,
        KEYS=32 if wide else 64,
        PADDED_D=padded,
        SPLITS=splits,
        SCATTERED=pages.places is not None,
        TREE=pages.tree is not None,
        WINDOWED=window is not None,
        NUM_IDS=0 if ids is None else len(ids),
        SOFTCAP=softcap is not None,
        SINKS=sinks is not None,
        num_warps=4,
        num_stages=2,
    )
    if splits > 1:
        _merge[(T, H)](
            out,
            target,
            maxima,
            sums,
            tiles,
            NUM_HEADS=H,
            D=D,
            PADDED_D=padded,
            SPLITS=splits,
            num_warps=4,
            num_stages=1,
        )


def queries_of_a_tile(group: int) -> int:
    """Queries that a tile of a chunk holds when so many query heads share a key head."""
    return max(1, CHUNK_ROWS // triton.next_power_of_2(group))


def num_splits(programs: int, context: int, processors: int) -> int:
    """Into how many parts the keys of sequences of up to `context` tokens are cut: a power of 2, so that there is work
    for every processor twice, and each part has 128 keys or more."""
    wanted = min(2 * processors // programs, context // 128, MAX_SPLITS)
    return 1 << (wanted.bit_length() - 1) if wanted > 1 else 1


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 16
    return torch.cuda.get_device_properties(device).multi_processor_count
