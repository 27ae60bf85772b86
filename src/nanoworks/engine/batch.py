"""One step's tokens as flat arrays: what the runner hands to the model.

Shapes as in `nn.paged_inputs`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from torch import Tensor

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
    pooled: list[tuple[Chunk, int]] = field(default_factory=list)
    """Chunks whose hidden states become an embedding, and their first rows."""
    score_rows: list[int] = field(default_factory=list)
    """Rows after which the known token in `score_targets` comes, for `score_sequences`."""
    score_targets: list[int] = field(default_factory=list)
    score_sequences: list[Sequence] = field(default_factory=list)


def build_batch(plan: Schedule, *, block_size: int, device: torch.device) -> Batch:
    """Pack the chunks of `plan`, which must not be empty."""
    tokens: list[int] = []
    prev_tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    tree: list[int] = []
    starts: list[int] = []
    tables: list[list[int]] = []
    places: list[list[int]] = []
    gaps = False
    for chunk in plan.chunks:
        ids, start, stop, draft = chunk.sequence.ids, chunk.start, chunk.stop, chunk.draft
        starts.append(len(tokens))
        tokens += ids[start:stop]
        prev_tokens += ids[start - 1 : stop - 1] if start else [-1, *ids[: stop - 1]]
        positions += range(start, stop)
        end = stop
        if draft is not None:
            tree += [0] * (len(tokens) - len(tree))
            end += len(draft)
            tokens += draft.tokens
            prev_tokens += [draft.tokens[p] if p >= 0 else ids[stop - 1] for p in draft.parents]
            positions += [stop + depth for depth in draft.depths]
            tree += _ancestors(draft.parents)
        table = chunk.sequence.block_table
        slots += [table[at // block_size] * block_size + at % block_size for at in range(start, end)]
        width = -(-end // block_size)
        # A table has its gaps before the chunk, and may go on behind it.
        count = len(table) - (next(reversed(table)) + 1 - width)
        gaps |= count < width
        tables.append(list(islice(table.values(), count)))
        places.append(list(islice(table, count)))

    widest = max(map(len, tables))
    behind = max(next(reversed(chunk.sequence.block_table)) for chunk in plan.chunks) + 1
    columns = torch.from_numpy(np.array([tokens, positions, prev_tokens, slots])).to(device)
    batch = Batch(
        tokens=columns[0],
        positions=columns[1],
        prev_tokens=columns[2],
        slots=columns[3],
        block_tables=_padded(tables, widest, NULL_BLOCK, device),
        block_counts=[len(table) for table in tables],
        block_places=_padded(places, widest, behind, device) if gaps else None,
        query_lengths=[end - start for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True)],
        context_lengths=[chunk.stop for chunk in plan.chunks],
        tree=torch.tensor(tree + [0] * (len(tokens) - len(tree)), device=device) if tree else None,
        changes=plan.changes,
    )
    for first_row, chunk in zip(starts, plan.chunks, strict=True):
        _add_outputs(batch, first_row, chunk)
    return batch


def _padded(rows: list[list[int]], width: int, padding: int, device: torch.device) -> Tensor:
    filled = [row if len(row) == width else row + [padding] * (width - len(row)) for row in rows]
    return torch.from_numpy(np.array(filled)).to(device)


def _ancestors(parents: list[int]) -> list[int]:
    """For each drafted token the bits of itself and of those it follows, as a signed 64-bit number."""
    bits: list[int] = []
    for i, parent in enumerate(parents):
        bits.append((bits[parent] if parent >= 0 else 0) | 1 << i)
    return [b - 2**64 if b >= 2**63 else b for b in bits]


def _add_outputs(batch: Batch, first_row: int, chunk: Chunk) -> None:
    """Note what the rows of `chunk`, whose tokens begin at `first_row`, are needed for."""
    if chunk.sequence.request.pooling is not None:
        batch.pooled.append((chunk, first_row))
        return
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
