"""Block bookkeeping under random operations, with a model of the cache's content beside it."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoworks.engine.block_manager import NULL_BLOCK, BlockChanges, BlockManager, BlockTable, blocks_in_sight
from nanoworks.nn.context import Window

OPERATIONS = 2000
NUM_IDS = 30


@dataclass
class Written:
    """A sequence: its table, its token ids, what was written for each, and from where on it still asks."""

    table: BlockTable = field(default_factory=dict)
    ids: list[int] = field(default_factory=list)
    content: list[int] = field(default_factory=list)
    start: int = 0


class Simulation:
    """Sequences of tokens, their tables, and blocks of memory that hold what was written to them."""

    def __init__(self, num_blocks: int, block_size: int, window: Window | None, seed: int) -> None:
        self.rng = random.Random(seed)
        self.manager = BlockManager(num_blocks, block_size, window)
        self.size = block_size
        self.memory: list[list[object]] = [[None] * block_size for _ in range(num_blocks)]
        self.sequences: list[Written] = []
        self.written = 0

    def run(self, operations: int) -> None:
        for _ in range(operations):
            self.rng.choice(
                [self.start, self.grow, self.grow, self.grow, self.drop, self.fork, self.rewind, self.end]
            )()
            self.manager.check(sequence.table for sequence in self.sequences)
        for sequence in self.sequences:
            self.manager.free(sequence.table)
        assert self.manager.num_free == self.manager.num_total

    def pick(self) -> Written | None:
        return self.rng.choice(self.sequences) if self.sequences else None

    def start(self) -> None:
        self.sequences.append(Written())

    def grow(self) -> None:
        if (sequence := self.pick()) is None:
            return
        begin = len(sequence.content)
        stop = begin + self.rng.randint(1, 3 * self.size)
        before, free = dict(sequence.table), self.manager.num_free
        changes = BlockChanges()
        if not self.manager.reserve(sequence.table, begin, stop, changes):
            assert (sequence.table, self.manager.num_free) == (before, free)
            assert changes == BlockChanges()
            return
        sources = [list(self.memory[source]) for source, _ in changes.copies]
        for (_, target), block in zip(changes.copies, sources, strict=True):
            self.memory[target] = block
        for block in changes.fresh:
            self.memory[block] = [None] * self.size
        for position in range(begin, stop):
            sequence.content.append(self.written)
            sequence.ids.append(self.rng.randrange(NUM_IDS))
            self.memory[sequence.table[position // self.size]][position % self.size] = self.written
            self.written += 1
        self.check_contents()
        window = self.manager.window
        if window is not None and not window.token_ids and sequence.start == begin:
            assert len(sequence.table) <= blocks_in_sight(window, stop - begin, self.size)

    def in_sight(self, sequence: Written) -> list[int]:
        """Positions that tokens from `start` on see, or are."""
        window, end = self.manager.window, len(sequence.content)
        if window is None:
            return list(range(end))
        return [
            p
            for p in range(end)
            if p > sequence.start - window.size or p < window.first or sequence.ids[p] in window.token_ids
        ]

    def check_contents(self) -> None:
        """Nobody's tokens were changed, as far as they are in sight."""
        for sequence in self.sequences:
            for p in self.in_sight(sequence):
                assert self.memory[sequence.table[p // self.size]][p % self.size] == sequence.content[p]

    def drop(self) -> None:
        if (sequence := self.pick()) is not None:
            before, sequence.start = sequence.start, self.rng.randint(sequence.start, len(sequence.content))
            self.manager.drop(sequence.table, sequence.ids, before, sequence.start)
            self.check_contents()
            needed = {p // self.size for p in self.in_sight(sequence)}
            # The block that the next token goes to is kept, also when none of its old ones is in sight.
            needed |= set(range(sequence.start // self.size, self.manager.blocks_for(len(sequence.content))))
            assert set(sequence.table) == needed
            assert list(sequence.table) == sorted(needed)

    def fork(self) -> None:
        if (sequence := self.pick()) is not None:
            length = self.rng.randint(sequence.start, len(sequence.content))  # a fork may leave in the middle
            free = self.manager.num_free
            table = self.manager.fork(sequence.table, length)
            self.sequences.append(Written(table, sequence.ids[:length], sequence.content[:length], sequence.start))
            assert self.manager.num_free == free

    def rewind(self) -> None:
        """Preemption: blocks go, the sequence stays."""
        if (sequence := self.pick()) is not None:
            self.manager.free(sequence.table)
            sequence.ids.clear()
            sequence.content.clear()
            sequence.start = 0

    def end(self) -> None:
        if self.sequences:
            self.manager.free(self.sequences.pop(self.rng.randrange(len(self.sequences))).table)


windows = st.builds(
    Window,
    size=st.integers(1, 25),
    first=st.sampled_from([0, 0, 1, 3, 9]),
    token_ids=st.sampled_from([(), (), (4,), (1, 2, 3)]),
)


@given(
    num_blocks=st.integers(2, 40),
    block_size=st.integers(1, 6),
    window=st.none() | windows,
    seed=st.integers(0, 2**32),
)
@settings(max_examples=50, deadline=None)
def test_a_hundred_thousand_operations_keep_every_token_in_sight_and_leak_no_block(
    num_blocks: int, block_size: int, window: Window | None, seed: int
) -> None:
    Simulation(num_blocks, block_size, window, seed).run(OPERATIONS)


@given(window=windows, num_tokens=st.integers(1, 40), block_size=st.integers(1, 9))
def test_the_bound_is_reached_and_never_exceeded(window: Window, num_tokens: int, block_size: int) -> None:
    held = []
    for start in range(200, 200 + 2 * block_size):
        manager = BlockManager(400, block_size, Window(window.size, window.first))
        table: BlockTable = {}
        assert manager.reserve(table, 0, start, BlockChanges())
        manager.drop(table, [0] * start, 0, start)
        assert manager.reserve(table, start, start + num_tokens, BlockChanges())
        held.append(len(table))
    assert max(held) == blocks_in_sight(window, num_tokens, block_size)


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("window", [Window(1), Window(20), Window(20, first=5), Window(64)])
def test_the_longest_chunk_is_the_largest_that_fits(window: Window, block_size: int) -> None:
    for num_blocks in range(2, 80):
        manager = BlockManager(num_blocks, block_size, window)
        chunk = manager.max_chunk(limit=50)
        fits = [n for n in range(1, 51) if blocks_in_sight(window, n, block_size) <= manager.num_total]
        assert chunk == (min(fits[-1], window.size) if fits else sys.maxsize)
        assert manager.max_length == (sys.maxsize if fits else manager.num_total * block_size)


def test_a_partly_filled_shared_block_is_copied_once_for_each_writer_but_the_last() -> None:
    manager = BlockManager(10, 4)
    first: BlockTable = {}
    assert manager.reserve(first, 0, 6, BlockChanges())
    second, third = manager.fork(first, 6), manager.fork(first, 6)
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
    first: BlockTable = {}
    assert manager.reserve(first, 0, 8, BlockChanges())
    second = manager.fork(first, 8)
    changes = BlockChanges()
    assert manager.reserve(second, 8, 9, changes)
    assert [second[0], second[1]] == [first[0], first[1]]
    assert changes == BlockChanges(copies=[], fresh=[second[2]])


def test_the_null_block_is_never_given_out() -> None:
    manager = BlockManager(4, 1)
    table: BlockTable = {}
    assert manager.reserve(table, 0, 3, BlockChanges())
    assert NULL_BLOCK not in table.values()
    assert not manager.reserve(table, 3, 4, BlockChanges())
