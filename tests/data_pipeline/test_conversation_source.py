"""Tasks and other lists of conversations as a source."""

from __future__ import annotations

from itertools import chain

import pytest

from nanoworks.common.errors import UserError
from nanoworks.data import ConversationSource, Reader


class Numbers:
    def __init__(self, start: int, stop: int) -> None:
        self._numbers = range(start, stop)

    def __len__(self) -> int:
        return len(self._numbers)

    def conversation(self, i: int) -> dict:
        return {"messages": [{"role": "user", "content": str(self._numbers[i])}]}


def numbers(documents) -> list[int]:
    return [int(document["messages"][0]["content"]) for document in documents]


def test_several_items_are_shuffled_together_and_each_is_read_once_an_epoch():
    source = ConversationSource(Numbers(0, 30), Numbers(100, 150))
    read = numbers(document for _, document in Reader(source, seed=1, epochs=2))
    first, second = read[:80], read[80:]
    assert sorted(first) == sorted(second) == [*range(30), *range(100, 150)]
    assert first != second
    assert max(first[:20]) >= 100 > min(first[:20])


def test_ranks_share_the_conversations_evenly():
    source = ConversationSource(Numbers(0, 10))
    shares = [numbers(d for _, d in Reader(source, rank=r, world_size=3, seed=1, epochs=1)) for r in range(3)]
    assert sorted(map(len, shares)) == [3, 3, 4]
    assert sorted(chain.from_iterable(shares)) == list(range(10))


def test_a_limit_past_the_end_takes_everything():
    assert numbers(ConversationSource(Numbers(0, 3), Numbers(5, 7), limit=2)) == [0, 1, 5, 6]
    assert numbers(ConversationSource(Numbers(0, 3), limit=1000)) == [0, 1, 2]


def test_an_item_listed_twice_counts_twice():
    item = Numbers(0, 2)
    assert numbers(ConversationSource(item, item)) == [0, 1, 0, 1]


@pytest.mark.parametrize("items", [(), (Numbers(0, 0),)])
def test_no_conversation_at_all_is_an_error(items):
    with pytest.raises(UserError, match="no conversation"):
        ConversationSource(*items)
