"""Who owns which block of the KV cache.

The cache is cut into blocks of `block_size` tokens; a sequence holds a table of its blocks. Blocks are counted:
forked sequences share them, and a shared block is copied before one of them writes into it. Where all layers of a
model have a window, a block that every later token is too far from is given up, so a sequence holds a bounded
number of them whatever its length. Pure bookkeeping: no tensor is touched here. What has to happen to the tensors
(copies, zeroing) is returned to the caller. Block 0 is never given out; it is the zeros that padded tables point to.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from nanoworks.nn.context import Window

NULL_BLOCK = 0

BlockTable = dict[int, int]
"""Which block holds tokens `place * block_size` and on, for each place in rising order. Only places that were given
up are missing; from the first token in sight of the newest there is no gap."""


@dataclass
class BlockChanges:
    """What must be done to the cache before the next write: all `copies` (source, target), then zero `fresh`.

    All copies read before anything is written, so a source that was given up in the same step, and even handed
    out again, is still intact.
    """

    copies: list[tuple[int, int]] = field(default_factory=list)
    fresh: list[int] = field(default_factory=list)


def blocks_in_sight(window: Window, num_tokens: int, block_size: int) -> int:
    """Most blocks that a sequence of any length needs to take `num_tokens` more tokens at once, without those of
    `window.token_ids`, which nothing bounds."""
    span = window.size - 1 + num_tokens  # what the first of them sees, to the last of them
    return -(-window.first // block_size) + -(-(span - 1) // block_size) + 1


class BlockManager:
    """Args:
    num_blocks: including the null block, of `block_size` tokens each.
    window: what a token sees at most; None is everything.
    """

    def __init__(self, num_blocks: int, block_size: int, window: Window | None = None) -> None:
        assert min(num_blocks - 1, block_size) > 0, "no room for a token"
        self.num_blocks, self.block_size, self.window = num_blocks, block_size, window
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

    @property
    def max_length(self) -> int:
        """Most tokens of a sequence that has the pool for itself; `sys.maxsize` where a window bounds what it holds."""
        everything = self.num_total * self.block_size
        if self.window is None or self.window.token_ids:  # every token there is may have one of these ids
            return everything
        fits = blocks_in_sight(self.window, 1, self.block_size) <= self.num_total
        return sys.maxsize if fits else everything

    def max_chunk(self, limit: int) -> int:
        """Most tokens to take blocks for at a time; `sys.maxsize` for all that are known.

        With a window, as many as it holds: more would not bound what a sequence holds, fewer would read a prompt in
        needless steps. Never more than `limit`, nor than lets a sequence of any length fit into the pool.
        """
        if self.window is None:
            return sys.maxsize
        room = self.num_total - self.blocks_for(self.window.first) - 1
        chunk = min(limit, self.window.size, room * self.block_size + 2 - self.window.size)
        return chunk if chunk > 0 else sys.maxsize

    def most_blocks(self, num_tokens: int, max_chunk: int) -> int:
        """Blocks a sequence holds at most while it reads `num_tokens` tokens in chunks, `window.token_ids` apart."""
        blocks = self.blocks_for(num_tokens)
        return blocks if self.window is None else min(blocks, blocks_in_sight(self.window, max_chunk, self.block_size))

    def reserve(self, table: BlockTable, start: int, stop: int, changes: BlockChanges) -> bool:
        """Make tokens `start..stop-1` of a sequence writable: extend `table`, copy blocks it shares.

        Adds to `changes` what the cache has to do. Returns False, with nothing changed, when too few blocks
        are free.
        """
        touched = range(start // self.block_size, self.blocks_for(stop))
        new = [place for place in touched if place not in table]
        shared = [place for place in touched if place in table and self._references[table[place]] > 1]
        if len(new) + len(shared) > self.num_free:
            return False
        for place in shared:
            copy = self._take()
            changes.copies.append((table[place], copy))
            self._references[table[place]] -= 1
            table[place] = copy
        for place in new:
            table[place] = self._take()
            changes.fresh.append(table[place])
        return True

    def drop(self, table: BlockTable, ids: Sequence[int], start: int, stop: int) -> None:
        """Give up what tokens `start..stop-1` of the sequence `ids` have seen and no later one will see."""
        if self.window is None:
            return
        for place in range(self._first_in_sight(start), self._first_in_sight(stop)):
            if not self._is_global(place, ids):
                self._give_back(table.pop(place))

    def fork(self, table: BlockTable, stop: int) -> BlockTable:
        """Return a second table over the blocks that hold the tokens before `stop`."""
        end = self.blocks_for(stop)
        shared = {place: block for place, block in table.items() if place < end}
        for block in shared.values():
            self._references[block] += 1
        return shared

    def free(self, table: BlockTable) -> None:
        """Give up the blocks of `table`, which becomes empty."""
        for block in reversed(table.values()):
            self._give_back(block)
        table.clear()

    def check(self, tables: Iterable[BlockTable]) -> None:
        """Assert that `tables`, all the tables there are, account for every block."""
        owned = Counter(block for table in tables for block in table.values())
        free = set(self._free)
        assert len(free) == len(self._free), "a block is twice in the free list"
        assert NULL_BLOCK not in free | set(owned), "the null block was given out"
        for block in range(1, self.num_blocks):
            assert self._references[block] == owned[block], f"block {block} has a wrong count"
            assert (block in free) == (owned[block] == 0), f"block {block} is leaked or in use while free"

    def _first_in_sight(self, position: int) -> int:
        """Place of the first block that the token at `position` sees, global tokens apart."""
        assert self.window is not None
        return max(0, position + 1 - self.window.size) // self.block_size

    def _is_global(self, place: int, ids: Sequence[int]) -> bool:
        """Whether a block holds a token that stays in sight of all."""
        assert self.window is not None
        begin = place * self.block_size
        if begin < self.window.first:
            return True
        listed = self.window.token_ids
        return bool(listed) and any(token in listed for token in ids[begin : begin + self.block_size])

    def _give_back(self, block: int) -> None:
        self._references[block] -= 1
        assert self._references[block] >= 0, f"block {block} was freed twice"
        if self._references[block] == 0:
            self._free.append(block)

    def _take(self) -> int:
        block = self._free.pop()
        assert self._references[block] == 0
        self._references[block] = 1
        return block
