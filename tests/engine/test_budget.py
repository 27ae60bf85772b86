"""How a step's tokens are dealt out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nanoworks.engine import Engine, EngineConfig, Request, SamplingParams
from nanoworks.engine.budget import deal
from nanoworks.models import build_model, config_from_dict

WANTS = st.lists(st.integers(1, 300), max_size=12)


@given(WANTS, WANTS, st.integers(1, 400))
def test_nothing_is_dealt_twice_or_left_lying(wants: list[int], newcomers: list[int], budget: int) -> None:
    shares, kept = deal(wants, newcomers, budget)
    assert len(shares) == len(wants)
    assert all(0 <= share <= want for share, want in zip(shares, wants, strict=True))
    assert all(shares[:budget])  # each is sure of one
    assert sum(shares) + min(kept, sum(newcomers)) == min(budget, sum(wants) + sum(newcomers))
    readers = [i for i, want in enumerate(wants) if want > 1]
    if readers and budget > len(wants):
        first = readers[0]
        assert shares[first] == wants[first] or shares[first] - 1 >= (budget - len(wants)) / 4


def test_short_ones_are_read_beside_long_ones() -> None:
    assert deal([1, 1000, 800, 20], [], 100) == ([1, 25, 54, 20], 0)
    assert deal([1000, 1, 1000], [30], 100) == ([68, 1, 1], 30)
    assert deal([1000], [900], 100) == ([26], 74)
    assert deal([5, 7], [9], 100) == ([5, 7], 88)
    assert deal([9, 9, 9], [], 2) == ([1, 1, 0], 0)


def test_a_short_prompt_does_not_wait_for_eight_long_ones() -> None:
    config = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
    }
    engine = Engine(build_model(config_from_dict(config)).eval(), None, EngineConfig(max_batch_tokens=64))
    params = SamplingParams(max_tokens=2, temperature=0)
    long = [Request([3 + i] * 500, params) for i in range(8)]
    for request in long:
        engine.add(request)
    for _ in range(3):
        engine.step()
    short = Request([1, 2, 3, 4] * 5, params)
    engine.add(short)
    order: list[str] = []
    for step in range(1, 200):
        ended = [d.request_id for d in engine.step() if d.finish_reason]
        order += ended
        if short.request_id in ended:
            assert step <= 4
        if not engine.has_work:
            break
    assert order[0] == short.request_id
    assert order[1] == long[0].request_id  # and the oldest got on
    assert sorted(order[1:]) == sorted(request.request_id for request in long)
