"""Block bookkeeping under random operations, with a model of the cache's content beside it."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from nanoworks.engine.block_manager import NULL_BLOCK, BlockChanges, BlockManager, BlockTable

OPERATIONS = 2000


class Simulation:
    """Sequences of tokens, their tables, and blocks of memory that hold what was written to them."""

    def __init__(self, num_blocks: int, block_size: int, seed: int) -> None:
        self.rng = random.Random(seed)
        self.manager = BlockManager(num_blocks, block_size)
        self.size = block_size
        self.memory: list[list[object]] = [[None] * block_size for _ in range(num_blocks)]
        self.sequences: list[tuple[BlockTable, list[object]]] = []
        self.written = 0

    def run(self, operations: int) -> None:
        for _ in range(operations):
            self.rng.choice([self.start, self.grow, self.grow, self.grow, self.fork, self.rewind, self.end])()
            self.manager.check(table for table, _ in self.sequences)
        for table, _ in self.sequences:
            self.manager.free(table)
        assert self.manager.num_free == self.manager.num_total

    def pick(self) -> tuple[BlockTable, list[object]] | None:
        return self.rng.choice(self.sequences) if self.sequences else None

    def start(self) -> None:
        self.sequences.append(([], []))

    def grow(self) -> None:
        if (sequence := self.pick()) is None:
            return
        table, content = sequence
        stop = len(content) + self.rng.randint(1, 3 * self.size)
        before, free = list(table), self.manager.num_free
        changes = BlockChanges()
        if not self.manager.reserve(table, len(content), stop, changes):
            assert (table, self.manager.num_free) == (before, free)
            assert changes == BlockChanges()
            return
        sources = [list(self.memory[source]) for source, _ in changes.copies]
        for (_, target), block in zip(changes.copies, sources, strict=True):
            self.memory[target] = block
        for block in changes.fresh:
            self.memory[block] = [None] * self.size
        for position in range(len(content), stop):
            content.append(self.written)
            self.memory[table[position // self.size]][position % self.size] = self.written
            self.written += 1
        # Nobody's tokens were changed by it.
        for table, content in self.sequences:
            assert [self.memory[table[p // self.size]][p % self.size] for p in range(len(content))] == content

    def fork(self) -> None:
        if (sequence := self.pick()) is not None:
            table, content = sequence
            length = self.rng.randint(0, len(content))  # a fork may leave in the middle
            shared = table[: self.manager.blocks_for(length)]
            free = self.manager.num_free
            self.sequences.append((self.manager.fork(shared), content[:length]))
            assert self.manager.num_free == free

    def rewind(self) -> None:
        """Preemption: blocks go, the sequence stays."""
        if (sequence := self.pick()) is not None:
            self.manager.free(sequence[0])
            sequence[1].clear()

    def end(self) -> None:
        if self.sequences:
            table, _ = self.sequences.pop(self.rng.randrange(len(self.sequences)))
            self.manager.free(table)


@given(num_blocks=st.integers(2, 40), block_size=st.integers(1, 6), seed=st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_a_hundred_thousand_operations_keep_every_token_and_leak_no_block(
    num_blocks: int, block_size: int, seed: int
) -> None:
    Simulation(num_blocks, block_size, seed).run(OPERATIONS)


def test_a_partly_filled_shared_block_is_copied_once_for_each_writer_but_the_last() -> None:
    manager = BlockManager(10, 4)
    first: BlockTable = []
    assert manager.reserve(first, 0, 6, BlockChanges())
    second, third = manager.fork(first), manager.fork(first)
    assert manager.num_used == 2
    changes = BlockChanges()
    for table in (first, second, third):
        assert manager.reserve(table, 6, 7, changes)
    assert [source for source, _ in changes.copies] == [third[1]] * 2
    assert not changes.fresh
    assert first[0] == second[0] == third[0]
    assert len({first[1], second[1], third[1]}) == 3
    assert manager.num_used == 4


def test_full_blocks_stay_shared() -> None:
    manager = BlockManager(10, 4)
    first: BlockTable = []
    assert manager.reserve(first, 0, 8, BlockChanges())
    second = manager.fork(first)
    changes = BlockChanges()
    assert manager.reserve(second, 8, 9, changes)
    assert second[:2] == first
    assert changes == BlockChanges(copies=[], fresh=[second[2]])


def test_the_null_block_is_never_given_out() -> None:
    manager = BlockManager(4, 1)
    table: BlockTable = []
    assert manager.reserve(table, 0, 3, BlockChanges())
    assert NULL_BLOCK not in table
    assert not manager.reserve(table, 3, 4, BlockChanges())
