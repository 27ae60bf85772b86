"""A request whose values are not finite fails alone, and leaves nothing behind in the blocks that others get."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nanoworks.engine import Completion, Engine, EngineConfig, Request, SamplingParams
from nanoworks.models import Decoder
from nanoworks.nn import kernels

BAD = 250
GOOD = [[1, 2, 3], list(range(60)), [9] * 17, [i * i % 249 for i in range(40)]]
POISONED = [[BAD], [4, 5, BAD, 6], [BAD, *range(50)], [*range(70), BAD], [7, BAD] * 20]
PARAMS = SamplingParams(max_tokens=20, temperature=1.0, seed=1, logit_bias={BAD: -100.0})
KINDS: dict[str, dict[str, Any]] = {
    "portable": {"block_size": 4},
    "kernels": {},
    "chunks": {"max_batch_tokens": 19},
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
    "int8 cache": {"kv_dtype": "int8"},
    "n-grams": {"speculate": "ngram"},
}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def poisoned(request: pytest.FixtureRequest, new_model: Callable[..., Decoder]) -> Decoder:
    model = new_model()
    with torch.no_grad():
        model.embed_tokens.weight[BAD] = math.nan
    return model.to(request.param)


@pytest.mark.parametrize("kind", KINDS)
def test_one_requests_nan_stays_its_own(poisoned: Decoder, kind: str) -> None:
    config = KINDS[kind]
    if "kv_dtype" in config and not kernels.available():
        pytest.skip(f"no kernels: {kernels.why_not()}")

    def run(engine: Engine, prompts: list[list[int]]) -> list[Completion]:
        return [completion for [completion] in engine.generate(prompts, PARAMS)]

    def new() -> Engine:  # few blocks, so that those of the failed are soon those of others
        size = config.get("block_size", 8)
        return Engine(poisoned, None, EngineConfig(prefix_caching=False, num_blocks=320 // size, **config))

    expected = run(new(), GOOD)
    assert all(c.finish_reason == "length" and all(map(math.isfinite, c.logprobs)) for c in expected)
    engine = new()
    mixed = run(engine, [p for pair in zip(POISONED, [*GOOD, GOOD[0]], strict=True) for p in pair])
    assert [(c.finish_reason, c.token_ids) for c in mixed[::2]] == [("error", [])] * len(POISONED)
    assert [c.token_ids for c in mixed[1::2]] == [c.token_ids for c in [*expected, expected[0]]]
    afterwards = run(engine, GOOD)
    assert [c.token_ids for c in afterwards] == [c.token_ids for c in expected]
    for ours, theirs in zip(afterwards, expected, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-3)
    assert engine.stats().blocks_used == 0


@pytest.mark.parametrize("kind", ["portable", "kernels", "int8 cache"])
def test_no_prefix_of_a_failed_request_is_given_to_others(poisoned: Decoder, kind: str) -> None:
    """The tokens before the bad one are read in one chunk with it, and others begin with them."""
    config = KINDS[kind]
    if "kv_dtype" in config and not kernels.available():
        pytest.skip(f"no kernels: {kernels.why_not()}")
    alike = [*range(45)]
    [[expected]] = Engine(poisoned, None, EngineConfig(**config)).generate([[*alike, 1]], PARAMS)
    engine = Engine(poisoned, None, EngineConfig(**config))
    for _ in range(3):
        [[bad], [good]] = engine.generate([[*alike, BAD, *range(30), 1], [*alike, 1]], PARAMS)
        assert (bad.finish_reason, bad.token_ids) == ("error", [])
        assert good.token_ids == expected.token_ids
    assert engine.stats().prefix_hits > 0


@pytest.mark.parametrize("kind", ["kernels", "int8 cache"])
def test_tokens_before_a_bad_one_do_not_see_it(poisoned: Decoder, kind: str) -> None:
    """Also in one chunk, where a score is masked, so that whoever shares their blocks meanwhile gets what is right."""
    if not kernels.available():
        pytest.skip(f"no kernels: {kernels.why_not()}")
    scored = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=True)
    config = EngineConfig(prefix_caching=False, **KINDS[kind])
    [[plain]] = Engine(poisoned, None, config).generate([[*range(45)]], scored)
    engine = Engine(poisoned, None, config)
    request = Request([*range(45), BAD, 1, 2], scored)
    [sequence] = engine._add(request)
    while not sequence.finished:
        engine.step()
    assert sequence.completion.finish_reason == "error"
    assert sequence.scores[:44] == plain.prompt_logprobs
