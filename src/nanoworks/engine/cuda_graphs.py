"""Decoding steps as CUDA graphs: the launches of a step are recorded once and replayed, so that a small model does not
wait for Python.

A graph has a fixed number of rows (a bucket) and reads its inputs where they were when it was recorded. A step whose
sequences all have one token is copied there, and the rows that are left over are padding: they write to a block of
the cache that nobody else has, and nothing reads what they give. Graphs are recorded when they are first needed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanoworks.nn.paged_inputs import PagedInputs

_log = logging.getLogger(__name__)

_BEHIND = 2**20
"""A place in a table that is behind every token, and whose tokens still have 32-bit positions."""

Forward = Callable[[PagedInputs], Tensor]
Replay = Callable[[], Tensor]


@dataclass(slots=True, kw_only=True)
class DecodeInputs(PagedInputs):
    """One token a sequence, with nothing that is computed from a number on the host."""

    @property
    def lengths(self) -> Tensor:
        return self.positions + 1


class DecodeGraphs:
    """Args:
    max_rows: sequences in a step.
    table_width: blocks of a sequence at most.
    scratch_block: one of the cache that no sequence is given.
    windowed: tables may have gaps; then places are kept beside the blocks.
    """

    def __init__(
        self,
        *,
        max_rows: int,
        table_width: int,
        block_size: int,
        scratch_block: int,
        windowed: bool,
        device: torch.device,
    ) -> None:
        self._device = device
        self._buckets = buckets(max_rows)
        self._columns = torch.empty((4, max_rows), dtype=torch.long, device=device)
        self._tables = torch.empty((max_rows, table_width), dtype=torch.long, device=device)
        self._places = torch.empty_like(self._tables) if windowed else None
        # Padding is a first token, in the scratch block.
        self._padding = torch.tensor([[0], [0], [-1], [scratch_block * block_size]], device=device)
        self._scratch_block = scratch_block
        self._in_order = torch.arange(table_width, device=device)
        self._replays: dict[int, Replay] = {}
        self._pool: Any = None  # of memory, shared by all graphs
        self.works = True

    def clear(self) -> None:
        """Forget what was recorded, because the weights are elsewhere now."""
        self._replays.clear()
        self._pool = None

    def run(self, batch: PagedInputs, forward: Forward) -> Tensor | None:
        """Return the hidden states (N, C) of `batch`, or None where it is not for a graph.

        Args:
            forward: inputs -> hidden states, with nothing in it that waits for the device or copies to it. The same in
                every call until `clear`.
        """
        rows = len(batch.query_lengths)
        if not self.works or not self._suits(batch):
            return None
        size = next(size for size in self._buckets if size >= rows)
        inputs = self.fill(batch, size)
        if size not in self._replays:
            try:
                self._replays[size] = self._record(inputs, forward)
            except RuntimeError as e:  # something in the model cannot be recorded
                self.works = False
                self.clear()
                _log.warning("decoding runs without CUDA graphs: %s", str(e).strip().splitlines()[0])
                return None
        return self._replays[size]()[:rows].clone()  # the next step overwrites it

    def fill(self, batch: PagedInputs, size: int) -> DecodeInputs:
        """Copy `batch` to the first `size` rows of the buffers, padding behind, and return these."""
        rows, width = batch.block_tables.shape
        columns, tables = self._columns[:, :size], self._tables[:size]
        columns[:, rows:] = self._padding
        for column, values in zip(
            columns, (batch.tokens, batch.positions, batch.prev_tokens, batch.slots), strict=True
        ):
            column[:rows].copy_(values, non_blocking=True)
        tables.zero_()
        tables[rows:, 0] = self._scratch_block
        tables[:rows, :width].copy_(batch.block_tables, non_blocking=True)
        places = None
        if self._places is not None:
            places = self._places[:size]
            if batch.block_places is None:
                places.copy_(self._in_order.expand_as(places))
            else:
                places.fill_(_BEHIND)
                places[rows:, 0] = 0
                places[:rows, :width].copy_(batch.block_places, non_blocking=True)
        return DecodeInputs(
            tokens=columns[0],
            positions=columns[1],
            prev_tokens=columns[2],
            slots=columns[3],
            block_tables=tables,
            block_places=places,
            block_counts=[self._tables.size(1)] * size,
            query_lengths=[1] * size,
            context_lengths=[0] * size,  # each is its position and 1, see DecodeInputs
        )

    def _suits(self, batch: PagedInputs) -> bool:
        return (
            batch.tree is None
            and len(batch.query_lengths) == len(batch.tokens) <= self._buckets[-1]
            and batch.block_tables.size(1) <= self._tables.size(1)
            and (batch.block_places is None or self._places is not None)
        )

    def _record(self, inputs: DecodeInputs, forward: Forward) -> Replay:
        """Return what computes the hidden states from whatever the buffers hold when it is called."""
        if self._device.type != "cuda":
            return lambda: forward(inputs)
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles kernels and lets libraries take their workspace; a token is written twice
                forward(inputs)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            hidden = forward(inputs)
        self._pool = self._pool or graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return hidden

        return replay


def buckets(most: int) -> list[int]:
    """Numbers of rows that are recorded: 1, 2, 4, 8, then multiples of 8, and `most`."""
    sizes = [1, 2, 4, *range(8, most, 8)]
    return [*(size for size in sizes if size < most), most]
