"""On the CPU kernels a row's result is the same bits whatever its neighbours, its chunks and what was guessed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from nanoworks.common.errors import UserError
from nanoworks.engine import Completion, Engine, EngineConfig, SamplingParams
from nanoworks.engine.proposers.ngram import NgramProposer
from nanoworks.models import Decoder
from nanoworks.nn import kernels

needs_kernels = pytest.mark.skipif(kernels.why_not() is not None, reason=f"no kernels: {kernels.why_not()}")

PROMPTS = [[1, 2, 3, 1, 2, 3, 1, 2], list(range(100, 177)), [5] * 40, [i * i % 251 for i in range(150)]]
PARAMS = [
    SamplingParams(max_tokens=40, temperature=0.7, top_p=0.95, seed=3, logprobs=4, prompt_logprobs=True),
    SamplingParams(max_tokens=40, temperature=1.0, min_p=0.01, seed=4, logprobs=4, prompt_logprobs=True),
    SamplingParams(max_tokens=40, temperature=0.9, repetition_penalty=1.2, seed=5, logprobs=4, prompt_logprobs=True),
    SamplingParams(max_tokens=40, temperature=0.0, logprobs=4, prompt_logprobs=True),
]
WINDOWED = "mistral with a window"
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    WINDOWED: {"family": "mistral", "sliding_window": 75},
    "mixtral": {"family": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "nanochat": {"family": "nanochat", "num_key_value_heads": 4, "intermediate_size": 128},
    "nanochat_2026": {"family": "nanochat_2026", "intermediate_size": 128, "sliding_window": 75},
}
WEIGHTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {},
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
    "int8 cache": {"kv_dtype": "int8"},
    "all int8": {"quantize": "int8", "kv_dtype": "int8"},
}


def engine_of(model: Decoder, config: dict[str, Any]) -> Engine:
    engine = Engine(model, None, EngineConfig(batch_invariant=True, **config))
    if engine._speculator is not None:  # as much as it may, whatever pays off, and from the shortest repetition
        engine._speculator.length.limits = lambda sequences: [5] * len(sequences)  # type: ignore[method-assign]
        assert isinstance(engine._speculator.proposer, NgramProposer)
        engine._speculator.proposer.shortest = 1
    return engine


def bits(completion: Completion) -> Completion:
    assert completion.finish_reason == "length"
    return replace(completion, text="")


def ours(engine: Engine, crowd: int = 0) -> list[Completion]:
    """What PROMPTS give, amid `crowd` random requests."""
    rng = random.Random(crowd)
    others = [[rng.randrange(250) for _ in range(rng.randrange(1, 120))] for _ in range(crowd)]
    params = [SamplingParams(max_tokens=rng.randrange(1, 60), temperature=rng.choice([0, 1])) for _ in others]
    half = crowd // 2
    groups = engine.generate(others[:half] + PROMPTS + others[half:], params[:half] + PARAMS + params[half:])
    return [bits(completion) for [completion] in groups[half : half + len(PROMPTS)]]


@needs_kernels
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", MODELS)
def test_the_same_bits_alone_in_a_crowd_in_chunks_and_guessed(
    new_model: Callable[..., Decoder], name: str, weights: str
) -> None:
    model = new_model(context=256, **MODELS[name])
    if weights != "float32":
        model = model.bfloat16()
    own = {"prefix_caching": False, **WEIGHTS[weights]}
    alone = engine_of(model, own)
    expected = [bits(alone.generate([p], q)[0][0]) for p, q in zip(PROMPTS, PARAMS, strict=True)]

    assert ours(engine_of(model, own), crowd=20) == expected
    assert ours(engine_of(model, {**own, "max_batch_tokens": 23})) == expected
    assert ours(engine_of(model, {**own, "max_batch_tokens": 50, "max_num_seqs": 5}), crowd=6) == expected
    shared = engine_of(model, WEIGHTS[weights])
    assert ours(shared) == expected
    if name != WINDOWED:
        again = shared.generate(PROMPTS, [replace(p, prompt_logprobs=False) for p in PARAMS])
        assert shared.stats().prefix_hits > 0
        assert [
            replace(c, prompt_logprobs=e.prompt_logprobs) for [c], e in zip(again, expected, strict=True)
        ] == expected
    short = engine_of(model, {**own, "num_blocks": 24})
    assert ours(short, crowd=20) == expected
    assert short.stats().preemptions > 0 or name == WINDOWED  # whose sequences never hold more than they may
    guessing = engine_of(model, {**own, "speculate": "ngram", "max_draft": 5})
    assert ours(guessing, crowd=20) == expected
    assert guessing._speculator is not None
    assert guessing._speculator.accepted > 0


@needs_kernels
def test_threads_do_not_matter(new_model: Callable[..., Decoder]) -> None:
    model = new_model(context=256).bfloat16()
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ours(engine_of(model, {})))
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1] == results[2]


def test_where_it_cannot_be_promised_the_engine_refuses(new_model: Callable[..., Decoder]) -> None:
    model = new_model()
    with pytest.raises(UserError, match=r"batch_invariant.*block_size=8"):
        Engine(model, None, EngineConfig(batch_invariant=True, block_size=4))
    with pytest.raises(UserError, match=r"speculate=medusa.*ngram or draft"):
        Engine(model, None, EngineConfig(batch_invariant=True, speculate="medusa"))
    with pytest.raises(UserError, match="with batch_invariant use two"):
        EngineConfig(batch_invariant=True, tensor_parallel=3).check()
    with pytest.raises(UserError, match="typical_acceptance"):
        Engine(model, None, EngineConfig(batch_invariant=True, speculate="ngram", typical_acceptance=True))
