"""Who owns which block of the KV cache.

The cache is cut into blocks of `block_size` tokens; a sequence holds a table, the list of its blocks in
order. Blocks are counted: forked sequences share them, and a shared block is copied before one of them writes
into it. Pure bookkeeping: no tensor is touched here. What has to happen to the tensors (copies, zeroing) is
returned to the caller. Block 0 is never given out; it is the zeros that padded tables point to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

NULL_BLOCK = 0

BlockTable = list[int]


@dataclass
class BlockChanges:
    """What must be done to the cache before the next write: all `copies` (source, target), then zero `fresh`.

    All copies read before anything is written, so a source that was given up in the same step, and even handed
    out again, is still intact.
    """

    copies: list[tuple[int, int]] = field(default_factory=list)
    fresh: list[int] = field(default_factory=list)


class BlockManager:
    """Args: `num_blocks` blocks including the null block, of `block_size` tokens each."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert min(num_blocks - 1, block_size) > 0, "no room for a token"
        self.num_blocks, self.block_size = num_blocks, block_size
        self._free = list(range(num_blocks - 1, NULL_BLOCK, -1))  # a stack: the block freed last is warm
        self._references = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_total(self) -> int:
        """Blocks that can be given out."""
        return self.num_blocks - 1

    @property
    def num_used(self) -> int:
        return self.num_total - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """Number of blocks that `num_tokens` tokens fill."""
        return -(-num_tokens // self.block_size)

    def reserve(self, table: BlockTable, start: int, stop: int, changes: BlockChanges) -> bool:
        """Make tokens `start..stop-1` of a sequence writable: extend `table`, copy blocks it shares.

        Adds to `changes` what the cache has to do. Returns False, with nothing changed, when too few blocks
        are free.
        """
        last = self.blocks_for(stop)
        touched = range(start // self.block_size, min(last, len(table)))
        shared = [i for i in touched if self._references[table[i]] > 1]
        num_new = max(0, last - len(table))
        if num_new + len(shared) > self.num_free:
            return False
        for i in shared:
            copy = self._take()
            changes.copies.append((table[i], copy))
            self._references[table[i]] -= 1
            table[i] = copy
        for _ in range(num_new):
            table.append(self._take())
            changes.fresh.append(table[-1])
        return True

    def fork(self, table: BlockTable) -> BlockTable:
        """Return a second table over the same blocks."""
        for block in table:
            self._references[block] += 1
        return list(table)

    def free(self, table: BlockTable) -> None:
        """Give up the blocks of `table`, which becomes empty."""
        for block in reversed(table):
            self._references[block] -= 1
            assert self._references[block] >= 0, f"block {block} was freed twice"
            if self._references[block] == 0:
                self._free.append(block)
        table.clear()

    def check(self, tables: Iterable[BlockTable]) -> None:
        """Assert that `tables`, all the tables there are, account for every block."""
        owned = Counter(block for table in tables for block in table)
        free = set(self._free)
        assert len(free) == len(self._free), "a block is twice in the free list"
        assert NULL_BLOCK not in free | set(owned), "the null block was given out"
        for block in range(1, self.num_blocks):
            assert self._references[block] == owned[block], f"block {block} has a wrong count"
            assert (block in free) == (owned[block] == 0), f"block {block} is leaked or in use while free"

    def _take(self) -> int:
        block = self._free.pop()
        assert self._references[block] == 0
        self._references[block] = 1
        return block
