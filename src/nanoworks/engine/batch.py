"""One step's tokens as flat arrays: what the runner hands to the model.

Shapes as in `nn.paged_inputs`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch

from nanoworks.engine.adjust import Row
from nanoworks.engine.block_manager import NULL_BLOCK, BlockChanges
from nanoworks.engine.scheduler import Chunk, Schedule
from nanoworks.engine.sequence import Sequence
from nanoworks.nn.paged_inputs import PagedInputs


@dataclass(slots=True, kw_only=True)
class Batch(PagedInputs):
    changes: BlockChanges
    """What has to happen to the cache first."""

    sample_rows: list[int] = field(default_factory=list)
    """Rows of hidden states after which a token is sampled, for `samples`; samples of one prompt share its row."""
    samples: list[Row] = field(default_factory=list)
    verified: list[tuple[Chunk, int]] = field(default_factory=list)
    """Chunks after whose last token one is sampled, and the first of its rows in `samples`: one for that token, then
    one for each drafted one. Forks have a row each and no chunk."""
    score_rows: list[int] = field(default_factory=list)
    """Rows after which the known token in `score_targets` comes, for `score_sequences`."""
    score_targets: list[int] = field(default_factory=list)
    score_sequences: list[Sequence] = field(default_factory=list)


def build_batch(plan: Schedule, *, block_size: int, device: torch.device) -> Batch:
    """Pack the chunks of `plan`, which must not be empty."""
    tokens: list[int] = []
    prev_tokens: list[int] = []
    positions: list[int] = []
    places: list[int] = []  # of each token in its sequence's blocks
    tree: list[int] = []
    starts: list[int] = []
    ends: list[int] = []  # of each chunk with its draft
    for chunk in plan.chunks:
        ids, start, stop = chunk.sequence.ids, chunk.start, chunk.stop
        starts.append(len(tokens))
        tokens += ids[start:stop]
        prev_tokens += ids[start - 1 : stop - 1] if start else [-1, *ids[: stop - 1]]
        positions += range(start, stop)
        places += range(start, stop)
        tree += [0] * (stop - start)
        drafted = 0
        if chunk.draft is not None:
            drafted = len(chunk.draft)
            tokens += chunk.draft.tokens
            prev_tokens += [chunk.draft.tokens[p] if p >= 0 else ids[stop - 1] for p in chunk.draft.parents]
            positions += [stop + depth for depth in chunk.draft.depths]
            places += range(stop, stop + drafted)
            tree += _ancestors(chunk.draft.parents)
        ends.append(stop + drafted)

    lengths = [end - chunk.start for end, chunk in zip(ends, plan.chunks, strict=True)]
    widths = [-(-end // block_size) for end in ends]
    # A table has its gaps before the chunk, and may go on behind it.
    counts = [
        len(table) - (next(reversed(table)) + 1 - width)
        for table, width in zip((chunk.sequence.block_table for chunk in plan.chunks), widths, strict=True)
    ]
    gaps = np.subtract(widths, counts)
    tables = np.full((len(plan.chunks), max(counts)), NULL_BLOCK, dtype=np.int64)
    table_places = np.full_like(tables, max(widths)) if gaps.any() else None
    for i, (count, chunk) in enumerate(zip(counts, plan.chunks, strict=True)):
        table = chunk.sequence.block_table
        tables[i, :count] = list(islice(table.values(), count))
        if table_places is not None:
            table_places[i, :count] = list(islice(table, count))
    place = np.array(places)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    slots = tables[owner, place // block_size - gaps[owner]] * block_size + place % block_size

    batch = Batch(
        tokens=torch.tensor(tokens, device=device),
        positions=torch.tensor(positions, device=device),
        prev_tokens=torch.tensor(prev_tokens, device=device),
        slots=torch.from_numpy(slots).to(device),
        block_tables=torch.from_numpy(tables).to(device),
        block_counts=counts,
        block_places=None if table_places is None else torch.from_numpy(table_places).to(device),
        query_lengths=lengths,
        context_lengths=[chunk.stop for chunk in plan.chunks],
        tree=torch.tensor(tree, device=device) if any(tree) else None,
        changes=plan.changes,
    )
    for first_row, chunk in zip(starts, plan.chunks, strict=True):
        _add_outputs(batch, first_row, chunk)
    return batch


def _ancestors(parents: list[int]) -> list[int]:
    """For each drafted token the bits of itself and of those it follows, as a signed 64-bit number."""
    bits: list[int] = []
    for i, parent in enumerate(parents):
        bits.append((bits[parent] if parent >= 0 else 0) | 1 << i)
    return [b - 2**64 if b >= 2**63 else b for b in bits]


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
            if sequence is chunk.sequence:
                batch.verified.append((chunk, len(batch.samples)))
            batch.sample_rows.append(offset + stop - 1)
            batch.samples.append(Row(sequence))
            if sequence is chunk.sequence and chunk.draft is not None:
                batch.sample_rows += range(offset + stop, offset + stop + len(chunk.draft))
                batch.samples += [Row(sequence, path) for path in chunk.draft.paths]
