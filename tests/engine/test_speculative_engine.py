"""The engine with each proposer: the same tokens as without, whatever happens to the sequences on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nanoworks.checkpoint import save_checkpoint
from nanoworks.checkpoint.medusa import save_heads
from nanoworks.engine import Completion, Engine, EngineConfig, SamplingParams
from nanoworks.engine.proposers.ngram import NgramProposer
from nanoworks.models import Decoder
from nanoworks.nn.medusa import MedusaHeads
from nanoworks.tokenizer import Tokenizer

PROMPTS = [[1, 2, 3, 1, 2, 3, 1, 2, 3], [7, 8, 9, 10, 11, 12, 13], [40], list(range(60)), [5, 5, 5, 5, 5, 5]]
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
SEEDED = SamplingParams(max_tokens=24, temperature=0.7, top_p=0.95, seed=3, n=2, ignore_eos=True)
SETTINGS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "prompts in chunks": {"max_batch_tokens": 11},
    "blocks run out": {"num_blocks": 30, "block_size": 4},
    "one at a time": {"max_num_seqs": 1},
}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, model: Decoder, tokenizer: Tokenizer) -> Path:
    """The model as its own draft, and heads that say something else than it."""
    root = tmp_path_factory.mktemp("speculation")
    heads = MedusaHeads(32, 3)
    with torch.no_grad():
        for p in heads.parameters():
            p.normal_(std=0.02)
    with save_checkpoint(root / "run", model, tokenizer, metadata={}) as scratch:
        save_heads(scratch, heads, model, ranks=[[0.5, 0.3, 0.1], [0.4, 0.2, 0.1], [0.3, 0.2, 0.1]])
    return root / "run"


def run(engine: Engine, params: SamplingParams) -> list[list[Completion]]:
    if engine._speculator is not None:  # as much as it may, at every step: how much pays off is another matter
        limit = engine.config.max_draft
        engine._speculator.length.limits = lambda sequences: [limit] * len(sequences)  # type: ignore[method-assign]
        if isinstance(engine._speculator.proposer, NgramProposer):  # random text repeats no long n-gram
            engine._speculator.proposer.shortest = 1
    result = engine.generate(PROMPTS, params)
    assert engine.stats().blocks_used == 0
    return result


@pytest.mark.parametrize("kind", ["ngram", "draft", "medusa"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_tokens_are_those_without_speculation(
    house: Path, model: Decoder, tokenizer: Tokenizer, kind: str, setting: str
) -> None:
    for params in (GREEDY, SEEDED):
        plain = run(Engine(model, tokenizer, EngineConfig(**SETTINGS[setting])), params)
        config = EngineConfig(speculate=kind, draft_model=str(house), max_draft=6, **SETTINGS[setting])
        engine = Engine(model, tokenizer, config)
        ours = run(engine, params)
        for group, expected in zip(ours, plain, strict=True):
            for a, b in zip(group, expected, strict=True):
                assert a.token_ids == b.token_ids
                assert a.text == b.text
                assert a.finish_reason == b.finish_reason
                assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
        assert engine._speculator is not None
        assert engine._speculator.drafted > 0
        if kind == "draft":
            assert engine._speculator.accepted > 0


def test_a_draft_that_is_always_right_saves_steps(house: Path, model: Decoder, tokenizer: Tokenizer) -> None:
    plain = Engine(model, tokenizer, EngineConfig())
    engine = Engine(model, tokenizer, EngineConfig(speculate="draft", draft_model=str(house), max_draft=5))
    run(plain, GREEDY)
    run(engine, GREEDY)
    assert plain.stats().steps == 24
    assert engine.stats().steps == 1 + -(-23 // 6)


def test_stop_tokens_end_a_sample_inside_an_accepted_draft(house: Path, model: Decoder, tokenizer: Tokenizer) -> None:
    [[long]] = Engine(model, tokenizer).generate([PROMPTS[0]], GREEDY)
    for at in (3, 4, 5, 6, 7):
        params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, stop_ids=(long.token_ids[at],))
        config = EngineConfig(speculate="draft", draft_model=str(house), max_draft=5)
        [[plain]] = Engine(model, tokenizer).generate([PROMPTS[0]], params)
        [[ours]] = Engine(model, tokenizer, config).generate([PROMPTS[0]], params)
        assert ours.token_ids == plain.token_ids
        assert ours.finish_reason == plain.finish_reason == "stop"
