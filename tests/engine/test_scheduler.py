"""Scheduling without a model: which tokens run when, and who gives way."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from nanoworks.engine.block_manager import BlockManager
from nanoworks.engine.request import Request, SamplingParams
from nanoworks.engine.scheduler import Schedule, Scheduler
from nanoworks.engine.sequence import Draft, Sequence
from nanoworks.nn.context import Window


def make(
    num_blocks: int = 100,
    block_size: int = 4,
    max_num_seqs: int = 8,
    max_batch_tokens: int = 16,
    window: Window | None = None,
    prefix_caching: bool = False,
) -> Scheduler:
    blocks = BlockManager(num_blocks + 1, block_size, window, prefix_caching=prefix_caching)
    return Scheduler(blocks, max_num_seqs=max_num_seqs, max_batch_tokens=max_batch_tokens)


def sequence(length: int, *, max_tokens: int = 100, n: int = 1) -> Sequence:
    """The first sample of a request with a prompt of 1, 2, 3, ..."""
    request = Request(list(range(1, length + 1)), SamplingParams(max_tokens=max_tokens, n=n))
    samples = [
        Sequence(request, i, max_tokens=max_tokens, stop_ids=frozenset(), seed=0, text=None, tool=None)
        for i in range(n)
    ]
    samples[0].forks = samples[1:]
    return samples[0]


def step(scheduler: Scheduler) -> Schedule:
    """One step of an engine whose model always answers 0."""
    plan = scheduler.schedule()
    if plan.chunks:
        scheduler.commit(plan)
        for chunk in plan.chunks:
            for ready in (chunk.sequence, *chunk.forks):
                if ready.num_computed == len(ready.ids):
                    ready.append(0, 0.0, None)
                if ready.finished:
                    scheduler.remove(ready)
    return plan


def sizes(plan: Schedule) -> list[int]:
    return [chunk.stop - chunk.start for chunk in plan.chunks]


def test_a_long_prompt_is_read_in_chunks_while_others_go_on() -> None:
    scheduler = make(max_batch_tokens=8)
    scheduler.add(sequence(3))
    assert sizes(step(scheduler)) == [3]
    scheduler.add(sequence(17))
    assert sizes(step(scheduler)) == [1, 7]
    assert sizes(step(scheduler)) == [1, 7]
    assert sizes(step(scheduler)) == [1, 3]
    assert sizes(step(scheduler)) == [1, 1]


def test_first_come_first_served_within_the_limits() -> None:
    scheduler = make(max_num_seqs=3, max_batch_tokens=16)
    arrivals = [sequence(2) for _ in range(5)]
    for arrival in arrivals:
        scheduler.add(arrival)
    step(scheduler)
    assert scheduler.running == arrivals[:3]
    scheduler.remove(arrivals[1])
    step(scheduler)
    assert scheduler.running == [arrivals[0], arrivals[2], arrivals[3]]


def test_the_youngest_gives_way_and_returns_to_the_front() -> None:
    scheduler = make(num_blocks=6, block_size=4)
    first, second, third = (sequence(4) for _ in range(3))
    for arrival in (first, second, third):
        scheduler.add(arrival)
    while not scheduler.num_preemptions:
        step(scheduler)
    assert scheduler.running == [first, second]
    assert list(scheduler.waiting) == [third]
    assert third.num_computed == 0
    assert third.block_table == {}


def test_a_newcomer_does_not_take_the_blocks_the_running_grow_into() -> None:
    scheduler = make(num_blocks=3, block_size=4)
    scheduler.add(sequence(7))
    step(scheduler)
    scheduler.add(sequence(4))
    step(scheduler)
    assert len(scheduler.running) == 1  # the one free block is the first one's next


def test_samples_share_the_blocks_of_their_prompt() -> None:
    scheduler = make(block_size=4)
    first = sequence(10, n=3)
    forks = first.forks
    scheduler.add(first)
    plan = step(scheduler)
    assert plan.chunks[0].forks == forks
    assert scheduler.running == [first, *forks]
    assert scheduler.blocks.num_used == 3
    assert [len(s.completion.token_ids) for s in (first, *forks)] == [1, 1, 1]  # from the one row of the prompt's end
    assert sizes(step(scheduler)) == [1, 1, 1]
    assert scheduler.blocks.num_used == 5  # two full blocks shared, the partial one copied twice


def test_forks_wait_until_the_prompt_is_read() -> None:
    scheduler = make(max_batch_tokens=4)
    first = sequence(10, n=2)
    scheduler.add(first)
    assert [len(step(scheduler).chunks[0].forks) for _ in range(3)] == [0, 0, 1]


def test_more_samples_than_seats_take_turns() -> None:
    scheduler = make(max_num_seqs=2)
    first = sequence(3, n=5, max_tokens=3)
    samples = [first, *first.forks]
    scheduler.add(first)
    for _ in range(20):
        assert len(step(scheduler).chunks) <= 2
    assert all(s.finished for s in samples)
    assert scheduler.blocks.num_used == 0


def test_a_window_bounds_what_a_prompt_and_its_output_hold() -> None:
    scheduler = make(block_size=4, window=Window(8))
    scheduler.add(sequence(100, max_tokens=40))
    steps = []
    while scheduler.running or scheduler.waiting:
        [size] = sizes(step(scheduler))
        steps.append((size, scheduler.blocks.num_used))
    assert steps[:12] == [(8, 1 + 1)] + [(8, 2)] * 11  # a chunk is as long as the window; 7 tokens stay in sight
    assert steps[12] == (4, 2)
    assert [size for size, _ in steps[13:]] == [1] * 39
    assert {used for _, used in steps[13:-1]} == {2, 3}


def test_a_newcomer_with_a_window_waits_for_its_bounded_need_only() -> None:
    scheduler = make(num_blocks=9, block_size=4, window=Window(8), max_batch_tokens=100)
    first, second = sequence(1000), sequence(1000)
    scheduler.add(first)
    step(scheduler)
    scheduler.add(second)
    step(scheduler)
    assert scheduler.running == [first]  # 8 and 7 tokens touch 5 blocks; one for the first one's next is to spare
    roomy = make(num_blocks=11, block_size=4, window=Window(8), max_batch_tokens=100)
    for arrival in (sequence(1000), sequence(1000)):
        roomy.add(arrival)
        step(roomy)
    assert len(roomy.running) == 2
    while roomy.running or roomy.waiting:
        step(roomy)
    assert roomy.num_preemptions == 0


def test_samples_of_a_prompt_longer_than_the_window_share_what_is_in_sight() -> None:
    scheduler = make(block_size=4, window=Window(8, first=2))
    first = sequence(38, n=3)
    scheduler.add(first)
    while not step(scheduler).chunks[0].forks:
        pass
    assert [list(s.block_table) for s in scheduler.running] == [[0, 7, 8, 9]] * 3
    assert scheduler.blocks.num_used == 4
    step(scheduler)
    assert scheduler.blocks.num_used == 5  # the last one, half full, was copied twice; 7 went out of sight
    while scheduler.running or scheduler.waiting:
        step(scheduler)
        scheduler.blocks.check(s.block_table for s in scheduler.running)
    assert scheduler.blocks.num_used == 0


WINDOWS = [None, Window(1), Window(7), Window(9, first=3), Window(5, token_ids=(0,)), Window(4, token_ids=(2, 9))]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("seed", range(30))
def test_everything_ends_whatever_arrives_and_is_cancelled(seed: int, window: Window | None) -> None:
    rng = random.Random(seed)
    scheduler = make(
        num_blocks=rng.randint(6, 12),
        block_size=rng.randint(1, 5),
        max_num_seqs=rng.randint(1, 6),
        max_batch_tokens=rng.randint(1, 12),
        window=window,
    )
    capacity = min(scheduler.blocks.max_length, 100)
    arrivals: list[Sequence] = []
    samples: list[Sequence] = []
    for _ in range(400):
        if rng.random() < 0.1 and len(arrivals) < 25:
            length = rng.randint(1, capacity - 1)
            arrivals.append(sequence(length, n=rng.randint(1, 3), max_tokens=rng.randint(1, capacity - length)))
            samples += [arrivals[-1], *arrivals[-1].forks]
            scheduler.add(arrivals[-1])
        if rng.random() < 0.02 and scheduler.running:
            victim = rng.choice(scheduler.running)
            for ended in (victim, *victim.forks):
                ended.finish("cancelled")
                scheduler.remove(ended)
        plan = step(scheduler)
        assert sum(sizes(plan)) <= scheduler.max_batch_tokens
        assert len(plan.chunks) <= scheduler.max_num_seqs
        assert all(size > 0 for size in sizes(plan))
        queue = [arrivals.index(first_of(s, arrivals)) for s in (*scheduler.running, *scheduler.waiting)]
        assert all(a <= b for a, b in pairwise(queue)), "not in order of arrival"
        scheduler.blocks.check(s.block_table for s in samples)
    for _ in range(3000):
        if not step(scheduler).chunks:
            break
    assert all(s.finished for s in samples)
    assert scheduler.blocks.num_used == 0


def first_of(s: Sequence, arrivals: list[Sequence]) -> Sequence:
    return next(first for first in arrivals if first.request is s.request)


# ------------------------------------------------------------------------------------------------------- drafts


def talking(scheduler: Scheduler, length: int = 5, draft: Draft | None = None) -> Sequence:
    """A sequence that is one token short of sampling its second token."""
    arrival = sequence(length)
    scheduler.add(arrival)
    step(scheduler)
    arrival.draft = draft
    return arrival


def verify(scheduler: Scheduler, plan: Schedule, path: list[int]) -> None:
    """What the engine does when the tokens of `path`, and a 0 after them, were sampled."""
    [chunk] = plan.chunks
    scheduler.commit(plan)
    assert chunk.draft is not None
    for token in [*(chunk.draft.tokens[i] for i in path), 0]:
        chunk.sequence.append(token, 0.0, None)
    scheduler.accept(chunk, path)


def test_a_draft_gets_blocks_and_what_was_in_vain_goes_back() -> None:
    scheduler = make(block_size=4)
    arrival = talking(scheduler, draft=Draft([7] * 6, [-1, 0, 1, 2, 3, 4]))
    plan = scheduler.schedule()
    [chunk] = plan.chunks
    assert (chunk.start, chunk.stop, chunk.draft) == (5, 6, Draft([7] * 6, [-1, 0, 1, 2, 3, 4]))
    assert arrival.draft is None
    assert list(arrival.block_table) == [0, 1, 2]  # 6 tokens and 6 drafted ones
    verify(scheduler, plan, [0])
    assert arrival.num_computed == 7
    assert len(arrival.ids) == 8
    assert list(arrival.block_table) == [0, 1]
    scheduler.blocks.check([arrival.block_table])


def test_an_accepted_path_through_a_tree_is_moved_into_a_row() -> None:
    scheduler = make(block_size=4)
    #    7 - 4       the tree: 0 -> 2, 1 -> 3 -> 4
    #    8 - 5 - 6
    arrival = talking(scheduler, draft=Draft([7, 8, 4, 5, 6], [-1, -1, 0, 1, 3]))
    plan = scheduler.schedule()
    blocks = [arrival.block_table[place] for place in range(3)]
    verify(scheduler, plan, [1, 3, 4])
    assert arrival.ids[-5:] == [0, 8, 5, 6, 0]
    assert arrival.num_computed == 9

    def slot(at: int) -> int:
        return blocks[at // 4] * 4 + at % 4

    # Token i of the draft was written at 6 + i; 8, 5 and 6 belong at 6, 7 and 8.
    assert scheduler.schedule().changes.moves == [(slot(7), slot(6)), (slot(9), slot(7)), (slot(10), slot(8))]
    assert scheduler.schedule().changes.moves == []


def test_a_draft_is_cut_to_the_budget_and_never_takes_the_token_of_another() -> None:
    scheduler = make(max_batch_tokens=6)
    first, second = talking(scheduler), talking(scheduler)
    first.draft = second.draft = Draft([7] * 9, [-1] * 9)
    plan = scheduler.schedule()
    assert [len(chunk.draft or ()) for chunk in plan.chunks] == [4, 0]
    assert sizes(plan) == [1, 1]


def test_a_draft_preempts_nobody() -> None:
    scheduler = make(num_blocks=5, block_size=4)
    first, second = talking(scheduler, 5), talking(scheduler, 5)
    assert scheduler.blocks.num_free == 1
    first.draft = Draft([7] * 9, [-1, 0, 1, 2, 3, 4, 5, 6, 7])
    plan = scheduler.schedule()
    assert [len(chunk.draft or ()) for chunk in plan.chunks] == [1, 0]  # what its last block has room for
    assert scheduler.running == [first, second]
    assert scheduler.num_preemptions == 0


def test_a_sequence_that_has_more_to_read_takes_no_draft() -> None:
    scheduler = make(max_batch_tokens=4)
    arrival = sequence(10)
    scheduler.add(arrival)
    arrival.draft = Draft([7], [-1])
    assert [chunk.draft for _ in range(2) for chunk in step(scheduler).chunks] == [None, None]


def test_accepted_tokens_can_be_found_by_the_next_request_and_rejected_ones_cannot() -> None:
    scheduler = make(block_size=4, prefix_caching=True)
    talking(scheduler, draft=Draft([7, 8, 9, 9, 9, 9], [-1, 0, 1, 2, 3, 4]))
    verify(scheduler, scheduler.schedule(), [0, 1])
    known = [1, 2, 3, 4, 5, 0, 7, 8]
    assert len(scheduler.blocks.match([*known, 9, 9, 9, 9], 12)) == 2
    assert len(scheduler.blocks.match([*known, 0, 9, 9, 9], 12)) == 2


# -------------------------------------------------------------------------------------------------------- waste

# (prompt, output) tokens of 16 requests of mixed sizes
MIXED = [(114, 51), (133, 115), (44, 41), (242, 100), (56, 78), (181, 39), (161, 59), (41, 43), (143, 85), (49, 62)]
MIXED += [(55, 102), (140, 39), (243, 104), (63, 60), (193, 112), (181, 39)]


@pytest.mark.parametrize(("block_size", "most"), [(8, 0.022), (16, 0.045)])
@pytest.mark.parametrize("max_batch_tokens", [256, 2048])
def test_few_slots_are_held_empty(block_size: int, most: float, max_batch_tokens: int) -> None:
    """Half a block a sequence, which is what paging costs: blocks are taken when tokens are computed, not before."""
    scheduler = make(num_blocks=1000, block_size=block_size, max_num_seqs=16, max_batch_tokens=max_batch_tokens)
    for prompt, output in MIXED:
        scheduler.add(sequence(prompt, max_tokens=output))
    while scheduler.running or scheduler.waiting:
        step(scheduler)
    assert 0 < scheduler.waste.mean < most
    assert scheduler.waste.peak <= 0.25  # of the few blocks that the first step holds


def test_empty_slots_are_counted_once_however_many_share_them() -> None:
    scheduler = make(block_size=4)
    scheduler.add(sequence(6, n=3))
    step(scheduler)
    scheduler.schedule()
    assert scheduler.waste.now == 2 / 8
