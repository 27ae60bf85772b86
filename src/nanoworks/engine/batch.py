"""One step's tokens as flat arrays: what the runner hands to the model.

Shapes: N tokens in all, S sequences with a chunk each, M blocks in the longest table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from nanoworks.engine.block_manager import NULL_BLOCK, BlockChanges
from nanoworks.engine.scheduler import Chunk, Schedule
from nanoworks.engine.sequence import Sequence


@dataclass(slots=True)
class Batch:
    tokens: Tensor
    """(N,) ids, chunk after chunk."""
    positions: Tensor
    """(N,) position of each token in its sequence."""
    prev_tokens: Tensor
    """(N,) id before each token, -1 at the start of a sequence."""
    slots: Tensor
    """(N,) where the token's key and value go: block * block_size + offset."""
    block_tables: Tensor
    """(S, M), padded with the null block."""
    block_counts: list[int]
    """(S,) blocks in each table."""
    block_places: Tensor | None
    """(S, M) which of its sequence's blocks each one is; None when every table begins at 0 and has no gap."""
    query_lengths: list[int]
    """(S,) tokens of each chunk."""
    context_lengths: list[int]
    """(S,) tokens of each sequence in the cache once the step is done."""
    changes: BlockChanges
    """What has to happen to the cache first."""

    sample_rows: list[int] = field(default_factory=list)
    """Rows after which a token is sampled, for `sample_sequences`; samples of one prompt share its row."""
    sample_sequences: list[Sequence] = field(default_factory=list)
    score_rows: list[int] = field(default_factory=list)
    """Rows after which the known token in `score_targets` comes, for `score_sequences`."""
    score_targets: list[int] = field(default_factory=list)
    score_sequences: list[Sequence] = field(default_factory=list)


def build_batch(plan: Schedule, *, block_size: int, device: torch.device) -> Batch:
    """Pack the chunks of `plan`, which must not be empty."""
    tokens: list[int] = []
    prev_tokens: list[int] = []
    positions: list[int] = []
    starts: list[int] = []
    for chunk in plan.chunks:
        ids, start, stop = chunk.sequence.ids, chunk.start, chunk.stop
        starts.append(len(tokens))
        tokens += ids[start:stop]
        prev_tokens += ids[start - 1 : stop - 1] if start else [-1, *ids[: stop - 1]]
        positions += range(start, stop)

    lengths = [chunk.stop - chunk.start for chunk in plan.chunks]
    widths = [-(-chunk.stop // block_size) for chunk in plan.chunks]
    # A table has its gaps before the chunk, and may go on behind it.
    counts = [
        len(table) - (next(reversed(table)) + 1 - width)
        for table, width in zip((chunk.sequence.block_table for chunk in plan.chunks), widths, strict=True)
    ]
    gaps = np.subtract(widths, counts)
    tables = np.full((len(plan.chunks), max(counts)), NULL_BLOCK, dtype=np.int64)
    places = np.full_like(tables, max(widths)) if gaps.any() else None
    for i, (count, chunk) in enumerate(zip(counts, plan.chunks, strict=True)):
        table = chunk.sequence.block_table
        tables[i, :count] = list(islice(table.values(), count))
        if places is not None:
            places[i, :count] = list(islice(table, count))
    position = np.array(positions)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    slots = tables[owner, position // block_size - gaps[owner]] * block_size + position % block_size

    batch = Batch(
        tokens=torch.tensor(tokens, device=device),
        positions=torch.tensor(positions, device=device),
        prev_tokens=torch.tensor(prev_tokens, device=device),
        slots=torch.from_numpy(slots).to(device),
        block_tables=torch.from_numpy(tables).to(device),
        block_counts=counts,
        block_places=None if places is None else torch.from_numpy(places).to(device),
        query_lengths=lengths,
        context_lengths=[chunk.stop for chunk in plan.chunks],
        changes=plan.changes,
    )
    for first_row, chunk in zip(starts, plan.chunks, strict=True):
        _add_outputs(batch, first_row, chunk)
    return batch


def _add_outputs(batch: Batch, first_row: int, chunk: Chunk) -> None:
    """Note what the logits of `chunk`, whose tokens begin at `first_row`, are needed for."""
    for sequence in (chunk.sequence, *chunk.forks):
        # A fork takes only the logits that follow the prompt, the rest of the chunk is not its own.
        stop = chunk.stop if sequence is chunk.sequence else sequence.num_computed
        offset = first_row - chunk.start
        for known in range(max(sequence.next_score, chunk.start + 1), min(sequence.score_until, stop + 1)):
            batch.score_rows.append(offset + known - 1)
            batch.score_targets.append(sequence.ids[known])
            batch.score_sequences.append(sequence)
        if sequence.max_tokens and stop == len(sequence.ids):
            batch.sample_rows.append(offset + stop - 1)
            batch.sample_sequences.append(sequence)
