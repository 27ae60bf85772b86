"""One rank's walk over a source: order, shares, and the position to resume from."""

from __future__ import annotations

import json
from itertools import chain, islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoworks.common.errors import UserError
from nanoworks.data import Reader

pages_of_documents = st.lists(st.integers(0, 5), min_size=1, max_size=8).filter(sum)


def build(memory_source, counts, shuffle):
    """Pages with so many documents each; every document is different."""
    return memory_source([[f"{page}.{i}" for i in range(n)] for page, n in enumerate(counts)], shuffle=shuffle)


@given(counts=pages_of_documents, world_size=st.integers(1, 6), shuffle=st.booleans(), seed=st.integers(0, 9))
def test_the_ranks_share_every_document_once_an_epoch(memory_source, counts, world_size, shuffle, seed):
    source = build(memory_source, counts, shuffle)
    shares = [
        [document for _, document in Reader(source, rank=rank, world_size=world_size, seed=seed, epochs=1)]
        for rank in range(world_size)
    ]
    assert sorted(chain.from_iterable(shares)) == sorted(source)


def test_a_single_page_still_feeds_every_rank(memory_source):
    source = memory_source([list("abcdefg")])
    shares = [[d for _, d in Reader(source, rank=rank, world_size=3, epochs=1)] for rank in range(3)]
    assert shares == [["a", "d", "g"], ["b", "e"], ["c", "f"]]


def test_without_shuffling_the_stored_order_is_kept_every_epoch(memory_source):
    source = memory_source([["a", "b"], [], ["c"]])
    assert [document for _, document in Reader(source, epochs=2)] == list("abcabc")


@pytest.mark.parametrize("pages", [1, 10])
def test_shuffling_gives_each_epoch_its_own_order_and_the_seed_decides_it(memory_source, pages):
    source = memory_source([[f"{page}.{i}" for i in range(100 // pages)] for page in range(pages)], shuffle=True)

    def epochs(seed: int) -> list[list[str]]:
        read = [document for _, document in Reader(source, seed=seed, epochs=2)]
        return [read[:100], read[100:]]

    first, second = epochs(1)
    assert sorted(first) == sorted(second) == sorted(source)
    assert first != second
    assert epochs(1) == [first, second]
    assert epochs(2)[0] != first


@given(
    counts=pages_of_documents,
    world_size=st.integers(1, 3),
    shuffle=st.booleans(),
    read=st.integers(0, 40),
)
def test_resuming_gives_exactly_what_would_have_followed(memory_source, counts, world_size, shuffle, read):
    source = build(memory_source, counts, shuffle)
    rank = world_size - 1
    if world_size > sum(counts) or (world_size <= len(counts) and not any(counts[rank::world_size])):
        return  # this rank has nothing to read

    def reader() -> Reader:
        return Reader(source, rank=rank, world_size=world_size, seed=3)

    try:
        whole = list(islice(reader(), read + 20))
    except UserError:
        return  # an order in which this rank has nothing to read
    interrupted = reader()
    assert list(islice(interrupted, read)) == whole[:read]
    resumed = reader()
    resumed.load_state(json.loads(json.dumps(interrupted.state())))
    assert list(islice(resumed, 20)) == whole[read:]


def test_an_address_finds_the_document_whatever_the_epoch_and_the_order(memory_source):
    source = memory_source([[f"{page}.{i}" for i in range(7)] for page in range(5)], shuffle=True)
    for (page, index), document in Reader(source, seed=5, epochs=3):
        assert source.fetch(page, {index}) == {index: document}


@pytest.mark.parametrize(
    ("before", "after", "left"),
    [(1, 4, 110), (2, 3, 100), (4, 2, 80), (3, 20, 90), (20, 3, 119)],
)
def test_on_another_number_of_ranks_reading_goes_on_disjoint_and_near(memory_source, before, after, left):
    source = memory_source([[f"{page}.{i}" for i in range(10)] for page in range(12)])
    old = Reader(source, rank=0, world_size=before)
    seen = next(old)[1]
    shares = []
    for rank in range(after):
        reader = Reader(source, rank=rank, world_size=after, epochs=1)
        reader.load_state(old.state())
        shares += [document for _, document in reader]
    # Left out is the turn of pages that was begun; 20 ranks share each page, so there it is one document.
    assert len(shares) == len(set(shares)) == left
    assert seen not in shares


def test_the_state_of_another_rank_does_not_repeat_its_documents(memory_source):
    source = memory_source([[f"{page}.{i}" for i in range(4)] for page in range(12)])
    old = Reader(source, rank=0, world_size=2)
    seen = [document for _, document in islice(old, 6)]
    other = Reader(source, rank=1, world_size=2, epochs=1)
    other.load_state(old.state())
    assert not set(seen) & {document for _, document in other}


def test_unreadable_documents_are_passed_over_and_counted(memory_source):
    reader = Reader(memory_source([["a", None], [None, "b"]]), epochs=2)
    assert [document for _, document in reader] == list("abab")
    assert reader.skipped == 4
    assert reader.state()["skipped"] == 4


def test_a_source_without_documents_is_an_error_not_an_endless_loop(memory_source):
    with pytest.raises(UserError, match="no document in the split"):
        next(Reader(memory_source([[], []])))
    with pytest.raises(UserError, match="no document for rank 1 of 2"):
        next(Reader(memory_source([["a"]]), rank=1, world_size=2))
    assert list(Reader(memory_source([["a"]]), rank=1, world_size=2, epochs=1)) == []
