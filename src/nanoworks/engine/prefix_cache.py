"""Finds blocks of the KV cache by the tokens they hold.

A full block is known by its own tokens and all tokens before it: its key is the name of the block before it, or the
salt where it is the first, together with its tokens. Names are never used twice, so a key is the whole chain and is
compared as such: unlike a hash it cannot be forged, and nobody reads another's text. Pure bookkeeping: which blocks may
be evicted is `block_manager`'s matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

Key = tuple[int | str, tuple[int, ...]]


class PrefixCache:
    """Args: `block_size` tokens in a block."""

    def __init__(self, block_size: int) -> None:
        self._size = block_size
        self._names = count()
        self._blocks: dict[Key, int] = {}
        self._known: dict[int, tuple[Key, int]] = {}  # key and name of each block that can be found

    def __contains__(self, block: int) -> bool:
        return block in self._known

    def __len__(self) -> int:
        return len(self._known)

    def key(self, ids: Sequence[int], place: int, before: int | None, salt: str) -> Key | None:
        """Key of the block at `place` of the sequence `ids` behind the block `before` (None: it is the first one).

        None where `ids` do not fill the block, or `before` cannot be found itself.
        """
        tokens = tuple(ids[place * self._size : (place + 1) * self._size])
        if len(tokens) < self._size or (before is not None and before not in self._known):
            return None
        return (salt if before is None else self._known[before][1], tokens)

    def match(self, ids: Sequence[int], stop: int, salt: str) -> list[int]:
        """Return the blocks that hold the longest known beginning of `ids[:stop]`, whole blocks only."""
        blocks: list[int] = []
        before = None
        for place in range(stop // self._size):
            key = self.key(ids, place, before, salt)
            before = None if key is None else self._blocks.get(key)
            if before is None:
                break
            blocks.append(before)
        return blocks

    def enter(self, key: Key, block: int) -> int:
        """Make `block` known by `key`; returns the block that was known by it already, if there is one."""
        known = self._blocks.setdefault(key, block)
        if known == block and block not in self._known:
            self._known[block] = (key, next(self._names))
        return known

    def forget(self, block: int) -> None:
        """Its content is about to change; does nothing for a block that is not known."""
        if block in self._known:
            key, _ = self._known.pop(block)
            del self._blocks[key]

    def check(self) -> None:
        assert {key: block for block, (key, _) in self._known.items()} == self._blocks, "two views of the cache differ"
