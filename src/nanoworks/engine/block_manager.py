"""Who owns which block of the KV cache.

The cache is cut into blocks of `block_size` tokens; a sequence holds a table of its blocks. Blocks are counted:
forked sequences share them, and a shared block is copied before one of them writes into it. Where all layers of a
model have a window, a block that every later token is too far from is given up, so a sequence holds a bounded
number of them whatever its length. Pure bookkeeping: no tensor is touched here. What has to happen to the tensors
(copies, zeroing) is returned to the caller. Block 0 is never given out; it is the zeros that padded tables point to.

With `prefix_caching` full blocks are found again by their tokens (`prefix_cache`), also after they were given up: they
count as free, and are taken for something else, the longest unused first, when no other free block is left. Not for
models with a window, whose sequences give blocks up in the middle.
"""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from nanoworks.engine.prefix_cache import Key, PrefixCache
from nanoworks.nn.context import Window

NULL_BLOCK = 0

BlockTable = dict[int, int]
"""Which block holds tokens `place * block_size` and on, for each place in rising order. Only places that were given
up are missing; from the first token in sight of the newest there is no gap."""


@dataclass
class BlockChanges:
    """What must be done to the cache before the next write: all `moves`, all `copies`, then zero `fresh`.

    All moves read before one of them is written, and all copies likewise, so a source that was given up in the same
    step, and even handed out again, is still intact.
    """

    moves: list[tuple[int, int]] = field(default_factory=list)
    """(source slot, target slot) of single tokens: an accepted path through a drafted tree is put in a row."""

    copies: list[tuple[int, int]] = field(default_factory=list)
    """(source, target) blocks."""
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
    prefix_caching: keep full blocks to be found again; without effect where there is a window.
    """

    def __init__(
        self, num_blocks: int, block_size: int, window: Window | None = None, *, prefix_caching: bool = False
    ) -> None:
        assert min(num_blocks - 1, block_size) > 0, "no room for a token"
        self.num_blocks, self.block_size, self.window = num_blocks, block_size, window
        self.prefix_caching = prefix_caching and window is None
        self._cache = PrefixCache(block_size)
        self._free = list(range(num_blocks - 1, NULL_BLOCK, -1))  # a stack: the block freed last is warm
        self._idle: OrderedDict[int, None] = OrderedDict()  # free as well, but known to `_cache`; oldest first
        self._references = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free) + len(self._idle)

    @property
    def num_cached(self) -> int:
        """Blocks that can be found by their tokens, in use or not."""
        return len(self._cache)

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
        own = table.get(touched[0]) if len(touched) == 1 else None
        if own is not None and self._references[own] == 1 and own not in self._cache:
            return True  # nearly always: one more token in a block of its own
        new = [place for place in touched if place not in table]
        shared = [place for place in touched if place in table and self._references[table[place]] > 1]
        if len(new) + len(shared) > self.num_free:
            return False
        for place in touched:
            if place in table and self._references[table[place]] == 1:
                self._cache.forget(table[place])  # it was full for a sequence that shared it; for this one it is not
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

    def trim(self, table: BlockTable, stop: int) -> None:
        """Give up the blocks behind the one that holds token `stop - 1`."""
        end = self.blocks_for(stop)
        while table and (place := next(reversed(table))) >= end:
            self._give_back(table.pop(place))

    def free(self, table: BlockTable) -> None:
        """Give up the blocks of `table`, which becomes empty."""
        # The last one first: it is also the first to be evicted, and the blocks before it are useful without it.
        for block in reversed(table.values()):
            self._give_back(block)
        table.clear()

    # -------------------------------------------------------------------------------------------- known prefixes

    def match(self, ids: Sequence[int], stop: int, salt: str = "") -> list[int]:
        """Return the blocks, whole ones only, that hold the longest known beginning of `ids[:stop]`."""
        return self._cache.match(ids, stop, salt)

    def num_idle(self, blocks: Iterable[int]) -> int:
        """How many of the matched `blocks` are counted as free."""
        return sum(self._references[block] == 0 for block in blocks)

    def adopt(self, table: BlockTable, blocks: Iterable[int]) -> None:
        """Begin an empty `table` with matched blocks."""
        assert not table
        for place, block in enumerate(blocks):
            if self._references[block] == 0:
                del self._idle[block]
            self._references[block] += 1
            table[place] = block

    def enter(self, table: BlockTable, ids: Sequence[int], start: int, stop: int, salt: str = "") -> None:
        """Note that tokens `start..stop-1` of the sequence `ids` are in the cache: full blocks can be found now.

        Where a block with the same tokens is known already, `table` takes that one and gives its own back.
        """
        if not self.prefix_caching:
            return
        for place in range(start // self.block_size, stop // self.block_size):
            key = self._cache.key(ids, place, table.get(place - 1), salt)
            if key is None:
                return
            own = table[place]
            known = self._cache.enter(key, own)
            if known != own:
                if self._references[known] == 0:
                    del self._idle[known]
                self._references[known] += 1
                self._give_back(own)
                table[place] = known

    def next_key(self, ids: Sequence[int], blocks: Sequence[int] | BlockTable, place: int, salt: str) -> Key | None:
        """Key of the block at `place` behind those before it; None where `ids` do not fill it."""
        return self._cache.key(ids, place, blocks[place - 1] if place else None, salt)

    def forget(self, table: BlockTable) -> None:
        """Find the blocks of `table` no more: what they hold is wrong."""
        for block in table.values():
            self._cache.forget(block)

    def forget_prefixes(self) -> None:
        """Find no block any more that was filled until now."""
        self._cache = PrefixCache(self.block_size)
        self._free += reversed(self._idle)
        self._idle.clear()

    # ------------------------------------------------------------------------------------------------- invariants

    def check(self, tables: Iterable[BlockTable]) -> None:
        """Assert that `tables`, all the tables there are, account for every block."""
        owned = Counter(block for table in tables for block in table.values())
        free = {*self._free, *self._idle}
        assert len(free) == self.num_free, "a block is twice in the free list"
        assert all(block in self._cache for block in self._idle), "a block is kept that nobody can find"
        assert not any(block in self._cache for block in self._free), "a known block is among the unknown"
        self._cache.check()
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
            if block in self._cache:
                self._idle[block] = None
            else:
                self._free.append(block)

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            self._cache.forget(block)
        assert self._references[block] == 0
        self._references[block] = 1
        return block
