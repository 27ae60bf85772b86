"""Past requests' keys and values used again: what is found, what never may be, and the same tokens come out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from nanoworks.engine import Engine, EngineConfig, Request, SamplingParams
from nanoworks.engine.block_manager import BlockChanges, BlockManager, BlockTable
from nanoworks.models import Decoder
from nanoworks.nn.context import Window

Greedy = Callable[[Decoder, list[int], int], list[int]]
Logprobs = Callable[[Decoder, list[int]], torch.Tensor]

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
PROMPT = [(7 * i + i // 5) % 200 for i in range(40)]


def fill(manager: BlockManager, ids: list[int], salt: str = "") -> BlockTable:
    """Compute `ids` as a new sequence does, without looking for a prefix."""
    table: BlockTable = {}
    assert manager.reserve(table, 0, len(ids), BlockChanges())
    manager.enter(table, ids, 0, len(ids), salt)
    return table


# --------------------------------------------------------------------------------------------------- bookkeeping


def test_whole_blocks_of_the_longest_known_beginning_are_found() -> None:
    manager = BlockManager(20, 4, prefix_caching=True)
    ids = list(range(14))
    blocks = list(fill(manager, ids).values())
    assert manager.match(ids, 14) == blocks[:3]
    assert manager.match(ids, 11) == blocks[:2]
    assert manager.match([*ids[:8], 99, *ids[9:]], 14) == blocks[:2]
    assert manager.match([99, *ids[1:]], 14) == []
    assert manager.match(ids[4:], 10) == []  # the same tokens elsewhere are something else


def test_a_salt_keeps_prefixes_apart() -> None:
    manager = BlockManager(20, 4, prefix_caching=True)
    ids = list(range(8))
    mine, yours = fill(manager, ids, "mine"), fill(manager, ids, "yours")
    assert manager.match(ids, 8, "mine") == list(mine.values())
    assert manager.match(ids, 8, "yours") == list(yours.values())
    assert manager.match(ids, 8) == []


def test_freed_blocks_stay_findable_until_they_are_taken_the_longest_unused_first() -> None:
    manager = BlockManager(7, 4, prefix_caching=True)
    old, new = list(range(8)), list(range(100, 108))
    for ids in (old, new):
        table = fill(manager, ids)
        manager.free(table)
    assert manager.num_free == 6
    assert (len(manager.match(old, 8)), len(manager.match(new, 8))) == (2, 2)
    taken: BlockTable = {}
    assert manager.reserve(taken, 0, 12, BlockChanges())  # two blocks were never used, one more is needed
    assert (len(manager.match(old, 8)), len(manager.match(new, 8))) == (1, 2)  # the end of the older one went
    manager.check([taken])


def test_what_is_computed_twice_is_held_once() -> None:
    manager = BlockManager(20, 4, prefix_caching=True)
    first, second = fill(manager, list(range(10))), fill(manager, list(range(10)))
    assert [first[0], first[1]] == [second[0], second[1]]
    assert manager.num_used == 4
    manager.check([first, second])


def test_nothing_is_found_after_a_reset_and_blocks_in_use_stay() -> None:
    manager = BlockManager(20, 4, prefix_caching=True)
    kept, freed = fill(manager, list(range(8))), fill(manager, list(range(50, 58)))
    manager.free(freed)
    manager.forget_prefixes()
    assert manager.match(list(range(8)), 8) == manager.match(list(range(50, 58)), 8) == []
    manager.check([kept])


def test_models_with_a_window_do_without() -> None:
    manager = BlockManager(20, 4, Window(8), prefix_caching=True)
    fill(manager, list(range(8)))
    assert manager.match(list(range(8)), 8) == []


# ------------------------------------------------------------------------------------------------- with a model


@pytest.mark.parametrize("family", ["llama", "nanochat"])
@pytest.mark.parametrize("length", [1, 4, 5, 8, 37, 40])
def test_a_full_hit_gives_the_same_tokens(
    family: str, length: int, new_model: Callable[..., Decoder], greedy: Greedy
) -> None:
    model = new_model(family)
    engine = Engine(model, None, EngineConfig(block_size=4))
    prompt = PROMPT[:length]
    expected = greedy(model, prompt, 12)
    for _ in range(3):
        assert engine.generate([prompt], GREEDY)[0][0].token_ids == expected
    assert engine.stats().prefix_hits == 2 * ((length - 1) // 4 * 4)  # the last token is always computed


@pytest.mark.parametrize("max_batch_tokens", [3, 2048])
@pytest.mark.parametrize("prefix_caching", [False, True])
def test_turns_of_a_conversation_go_on_where_the_last_one_ended(
    max_batch_tokens: int, prefix_caching: bool, model: Decoder, greedy: Greedy
) -> None:
    config = EngineConfig(block_size=4, max_batch_tokens=max_batch_tokens, prefix_caching=prefix_caching)
    engine = Engine(model, None, config)
    conversation = PROMPT[:10]
    for turn in range(4):
        answer = engine.generate([conversation], GREEDY)[0][0].token_ids
        assert answer == greedy(model, conversation, 12)
        conversation = [*conversation, *answer, turn, turn + 1]
    computed = engine.stats().tokens_computed
    everything = sum(10 + 14 * turn + 11 for turn in range(4))
    assert computed == everything - engine.stats().prefix_hits
    assert engine.stats().prefix_hits == (20 + 32 + 48 if prefix_caching else 0)


def test_one_reads_a_shared_beginning_for_all_that_come_together(model: Decoder, greedy: Greedy) -> None:
    engine = Engine(model, None, EngineConfig(block_size=4))
    prompts = [[*PROMPT, i, i + 1] for i in range(8)]
    found = engine.generate(prompts, replace(GREEDY, max_tokens=2))
    assert [c.token_ids for [c] in found] == [greedy(model, prompt, 2) for prompt in prompts]
    assert engine.stats().prefix_hits == 7 * 40
    assert engine.stats().tokens_computed == 40 + 8 * 3


def test_the_preempted_find_their_own_blocks(model: Decoder, greedy: Greedy) -> None:
    prompts = [[i, *PROMPT[:11]] for i in range(4)]
    expected = [greedy(model, prompt, 30) for prompt in prompts]
    tight = EngineConfig(block_size=4, num_blocks=30)
    for prefix_caching in (False, True):
        engine = Engine(model, None, tight.model_copy(update={"prefix_caching": prefix_caching}))
        found = engine.generate(prompts, replace(GREEDY, max_tokens=30))
        assert [c.token_ids for [c] in found] == expected
        assert engine.stats().preemptions > 0
        assert (engine.stats().prefix_hits > 0) == prefix_caching
        assert engine.stats().blocks_used == 0


def test_scores_and_samples_after_a_hit_are_those_without(model: Decoder, logprobs: Logprobs) -> None:
    engine = Engine(model, None, EngineConfig(block_size=4))
    asked = SamplingParams(max_tokens=0, prompt_logprobs=True)
    exact = logprobs(model, PROMPT)
    expected = [float(exact[i, t]) for i, t in enumerate(PROMPT[1:])]
    engine.generate([PROMPT], GREEDY)
    assert engine.generate([PROMPT], asked)[0][0].prompt_logprobs == pytest.approx(expected, abs=1e-4)
    pairs = [(PROMPT[:20], PROMPT[20:25]), (PROMPT[:20], PROMPT[20:40]), (PROMPT[:20], [3])]
    first, again = engine.loglikelihood(pairs), engine.loglikelihood(pairs)
    assert [found.sum for found in again] == pytest.approx([found.sum for found in first], abs=1e-4)
    assert first[1].sum == pytest.approx(sum(expected[19:39]), abs=1e-3)
    assert engine.stats().prefix_hits >= 2 * 16
    drawn = SamplingParams(max_tokens=10, n=3, seed=5, ignore_eos=True)
    samples = [[c.token_ids for c in engine.generate([PROMPT], drawn)[0]] for _ in range(2)]
    fresh = Engine(model, None, EngineConfig(block_size=4, prefix_caching=False))
    assert samples == [[c.token_ids for c in fresh.generate([PROMPT], drawn)[0]]] * 2


def test_a_salt_is_part_of_a_request(model: Decoder) -> None:
    engine = Engine(model, None, EngineConfig(block_size=4))
    for salt, hits in (("a", 0), ("b", 0), ("a", 36), ("", 36)):
        engine.add(Request(PROMPT, GREEDY, cache_salt=salt))
        while engine.has_work:
            engine.step()
        assert engine.stats().prefix_hits == hits


def test_new_weights_find_nothing_of_the_old(new_model: Callable[..., Decoder], greedy: Greedy) -> None:
    model = new_model()
    engine = Engine(model, None, EngineConfig(block_size=4))
    engine.generate([PROMPT], GREEDY)
    with torch.no_grad():
        model.embed_tokens.weight.mul_(-1)
    engine.generate([PROMPT], GREEDY)
    assert engine.stats().prefix_hits == 0
    assert engine.generate([PROMPT], GREEDY)[0][0].token_ids == greedy(model, PROMPT, 12)
    assert engine.stats().prefix_hits == 36
