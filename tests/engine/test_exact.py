"""Greedy output is one and the same by every way through the engine, in float32 and in bfloat16.

Two processes are in test_workers.py; sampled output, to the bit, in test_batch_invariance.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from nanoworks.checkpoint import save_checkpoint
from nanoworks.checkpoint.medusa import save_heads
from nanoworks.engine import Engine, EngineConfig, SamplingParams
from nanoworks.engine.proposers.ngram import NgramProposer
from nanoworks.models import Decoder
from nanoworks.nn.medusa import MedusaHeads
from nanoworks.tokenizer import Tokenizer

PROMPTS = [[1, 2, 3] * 7, list(range(90)), [40], [5] * 33, [i * i % 251 for i in range(50)]]
GREEDY = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "nanochat": {"num_key_value_heads": 4, "intermediate_size": 128},
}
WAYS: dict[str, dict[str, Any]] = {
    "prompts in chunks": {"max_batch_tokens": 17},
    "blocks of another size": {"block_size": 4},  # and so without the CPU kernels
    "n-gram": {"speculate": "ngram"},
    "draft": {"speculate": "draft"},
    "Medusa": {"speculate": "medusa"},
    "all at once": {"speculate": "ngram", "max_batch_tokens": 17, "num_blocks": 20},
}


class Case(NamedTuple):
    model: Decoder
    run: Path
    """Its checkpoint, with heads that were not trained."""
    expected: list[list[int]]
    """Of each prompt alone, without any caching of prefixes."""


@pytest.fixture(scope="module", params=[(f, d) for f in FAMILIES for d in (torch.float32, torch.bfloat16)], ids=str)
def case(
    request: pytest.FixtureRequest,
    new_model: Callable[..., Decoder],
    tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Case:
    family, dtype = request.param
    model = new_model(family, **FAMILIES[family]).to(dtype)
    heads = MedusaHeads(32, 3).to(dtype)
    with torch.no_grad():
        for p in heads.parameters():
            p.normal_(std=0.02)
    run = tmp_path_factory.mktemp(family) / "run"
    with save_checkpoint(run, model, tokenizer, metadata={}) as scratch:
        save_heads(scratch, heads, model, ranks=[[0.5, 0.3, 0.1], [0.4, 0.2, 0.1], [0.3, 0.2, 0.1]])
    plain = Engine(model, tokenizer, EngineConfig(prefix_caching=False))
    return Case(model, run, [plain.generate([prompt], GREEDY)[0][0].token_ids for prompt in PROMPTS])


def engine_of(case: Case, tokenizer: Tokenizer, config: dict[str, Any]) -> Engine:
    engine = Engine(case.model, tokenizer, EngineConfig(draft_model=str(case.run), **config))
    if engine._speculator is not None:  # as much as it may, whether it pays off or not
        engine._speculator.length.limits = lambda sequences: [6] * len(sequences)  # type: ignore[method-assign]
        if isinstance(engine._speculator.proposer, NgramProposer):
            engine._speculator.proposer.shortest = 1
    return engine


def tokens(engine: Engine) -> list[list[int]]:
    return [completion.token_ids for [completion] in engine.generate(PROMPTS, GREEDY)]


def test_without_any_engine(case: Case, greedy: Callable[[Decoder, list[int], int], list[int]]) -> None:
    if case.model.embed_tokens.weight.dtype == torch.float32:  # bfloat16 rounds otherwise there
        assert [
            greedy(case.model, prompt, len(ids)) for prompt, ids in zip(PROMPTS, case.expected, strict=True)
        ] == case.expected


@pytest.mark.parametrize("way", WAYS)
def test_greedy_output_is_the_same(case: Case, tokenizer: Tokenizer, way: str) -> None:
    if way == "blocks of another size" and case.model.embed_tokens.weight.dtype != torch.float32:
        pytest.skip("in bfloat16 PyTorch's attention rounds otherwise than the kernels")
    engine = engine_of(case, tokenizer, WAYS[way])
    assert tokens(engine) == case.expected
    assert tokens(engine) == case.expected  # with prefixes that were found
    assert engine.stats().prefix_hits > 0
    if engine._speculator is not None:
        assert engine._speculator.drafted > 0
        assert engine._speculator.accepted > 0 or way == "Medusa"
    if "num_blocks" in WAYS[way]:
        assert engine.stats().preemptions > 0


def test_preempted_sequences_find_what_they_had(case: Case, tokenizer: Tokenizer) -> None:
    engine = engine_of(case, tokenizer, {"num_blocks": 20})
    assert tokens(engine) == case.expected
    assert engine.stats().preemptions > 0
    assert engine.stats().prefix_hits > 0, "no prompt begins like another: what was found is what a preempted one had"
