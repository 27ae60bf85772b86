from __future__ import annotations

import torch

from nanoworks.engine.batch import build_batch
from nanoworks.engine.request import Request, SamplingParams
from nanoworks.engine.scheduler import Chunk, Schedule
from nanoworks.engine.sequence import Sequence

CPU = torch.device("cpu")


def sequence(prompt: list[int], *, blocks: list[int], max_tokens: int = 5, **named: object) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=bool(named.get("prompt_logprobs")))
    request = Request(prompt, params, continuations=named.get("continuations", ()))  # type: ignore[arg-type]
    made = Sequence(request, 0, max_tokens=max_tokens, stop_ids=frozenset(), seed=0, text=None, tool=None)
    made.block_table = dict(enumerate(blocks))
    return made


def test_packs_chunks_with_positions_slots_and_the_token_before() -> None:
    long, short = sequence([10, 11, 12, 13, 14], blocks=[7, 3, 5]), sequence([20], blocks=[2])
    batch = build_batch(Schedule([Chunk(long, 1, 4), Chunk(short, 0, 1)]), block_size=2, device=CPU)
    assert batch.tokens.tolist() == [11, 12, 13, 20]
    assert batch.positions.tolist() == [1, 2, 3, 0]
    assert batch.prev_tokens.tolist() == [10, 11, 12, -1]
    assert batch.slots.tolist() == [15, 6, 7, 4]
    assert batch.block_tables.tolist() == [[7, 3], [2, 0]]
    assert batch.block_counts == [2, 1]
    assert batch.block_places is None
    assert (batch.query_lengths, batch.context_lengths) == ([3, 1], [4, 1])
    assert batch.sample_rows == [3]  # the long prompt is not through
    assert [row.sequence for row in batch.samples] == [short]
    assert batch.score_rows == []


def test_tables_with_gaps_say_which_blocks_they_have() -> None:
    long, short = sequence(list(range(20)), blocks=[]), sequence([20, 21], blocks=[2])
    long.block_table = {0: 9, 3: 8, 4: 7, 5: 6, 6: 5}  # 1 and 2 are out of sight; 6 is for what comes later
    batch = build_batch(Schedule([Chunk(long, 9, 12), Chunk(short, 0, 2)]), block_size=2, device=CPU)
    assert batch.slots.tolist() == [15, 12, 13, 4, 5]
    assert batch.block_tables.tolist() == [[9, 8, 7, 6], [2, 0, 0, 0]]
    assert batch.block_counts == [4, 1]
    assert batch.block_places is not None
    [places, others] = batch.block_places.tolist()
    assert places == [0, 3, 4, 5]
    assert others[0] == 0
    assert all(place * 2 >= 12 for place in others[1:])  # padding lies behind every query


def test_scores_what_follows_each_row() -> None:
    scored = sequence([1, 2], blocks=[1, 2], max_tokens=0, continuations=[[3, 4, 5]])
    assert scored.num_to_compute == 4
    batch = build_batch(Schedule([Chunk(scored, 0, 3)]), block_size=4, device=CPU)
    assert list(zip(batch.score_rows, batch.score_targets, strict=True)) == [(1, 3), (2, 4)]
    assert batch.sample_rows == []
    scored.scores = [0.0, 0.0]
    batch = build_batch(Schedule([Chunk(scored, 3, 4)]), block_size=4, device=CPU)
    assert list(zip(batch.score_rows, batch.score_targets, strict=True)) == [(0, 5)]


def test_recomputation_does_not_score_twice() -> None:
    scored = sequence([1, 2, 3, 4], blocks=[1], prompt_logprobs=True)
    scored.scores = [0.0, 0.0]
    batch = build_batch(Schedule([Chunk(scored, 0, 4)]), block_size=4, device=CPU)
    assert list(zip(batch.score_rows, batch.score_targets, strict=True)) == [(2, 4)]
    assert batch.sample_rows == [3]


def test_forks_sample_from_the_row_that_ends_the_prompt() -> None:
    first, fork = sequence([1, 2, 3], blocks=[1]), sequence([1, 2, 3], blocks=[1])
    fork.num_computed = 3
    batch = build_batch(Schedule([Chunk(first, 0, 3, [fork])]), block_size=4, device=CPU)
    assert batch.sample_rows == [2, 2]
    assert [row.sequence for row in batch.samples] == [first, fork]
