"""The engine with each proposer: the same tokens as without, whatever happens to the sequences on the way."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanoworks.checkpoint import save_checkpoint
from nanoworks.checkpoint.medusa import save_heads
from nanoworks.common.errors import UserError
from nanoworks.engine import Completion, Engine, EngineConfig, SamplingParams
from nanoworks.engine.grammar import Grammar
from nanoworks.engine.proposers.ngram import NgramProposer
from nanoworks.models import Decoder
from nanoworks.nn.medusa import MedusaHeads
from nanoworks.tokenizer import Tokenizer

Logprobs = Callable[[Decoder, list[int]], torch.Tensor]

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


DIGITS = Grammar.json_schema({"type": "array", "items": {"type": "integer"}, "minItems": 3, "maxItems": 6})
UNDER_RULES: dict[str, dict[str, Any]] = {
    "a grammar": {"grammar": DIGITS, "max_tokens": 60},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2},
    "a bias and a least length": {"logit_bias": dict.fromkeys(range(0, 256, 3), 2.0), "min_tokens": 20},
    "all of them": {"grammar": DIGITS, "max_tokens": 60, "frequency_penalty": 0.3, "logit_bias": {49: 3.0}},
}


@pytest.mark.parametrize("kind", ["ngram", "draft", "medusa"])
@pytest.mark.parametrize("rules", UNDER_RULES)
def test_rules_hold_for_what_is_guessed_too(
    house: Path, model: Decoder, tokenizer: Tokenizer, kind: str, rules: str
) -> None:
    plain = Engine(model, tokenizer, EngineConfig())
    engine = Engine(model, tokenizer, EngineConfig(speculate=kind, draft_model=str(house), max_draft=6))
    for params in (replace(GREEDY, **UNDER_RULES[rules]), replace(SEEDED, **UNDER_RULES[rules])):
        expected, ours = run(plain, params), run(engine, params)
        assert [[c.token_ids for c in g] for g in ours] == [[c.token_ids for c in g] for g in expected]
        assert [[c.text for c in g] for g in ours] == [[c.text for c in g] for g in expected]
    assert engine.stats().drafted > 0
    if "grammar" in UNDER_RULES[rules]:
        assert all(len(json.loads(c.text)) >= 3 for group in ours for c in group if c.finish_reason == "stop")


def test_typical_acceptance_takes_what_the_draft_said_and_says_how_likely_it_was(
    house: Path, model: Decoder, tokenizer: Tokenizer, logprobs: Logprobs
) -> None:
    """More than exact acceptance takes; each token with the model's own log-probability, none that a filter drops."""
    params = SamplingParams(max_tokens=40, temperature=1.5, top_k=8, seed=1, n=4, ignore_eos=True)
    accepted = []
    for typical in (False, True):
        config = EngineConfig(speculate="draft", draft_model=str(house), typical_acceptance=typical, tools=False)
        engine = Engine(model, tokenizer, config)
        for prompt, group in zip(PROMPTS, run(engine, params), strict=True):
            for completion in group:
                rows = logprobs(model, [*prompt, *completion.token_ids])[len(prompt) - 1 : -1]
                chosen = rows.gather(1, torch.tensor(completion.token_ids)[:, None]).squeeze(1)
                assert completion.logprobs == pytest.approx(chosen.tolist(), abs=1e-3)
                assert bool((chosen >= rows.topk(8).values[:, -1] - 1e-4).all())
        accepted.append(engine.stats().draft_accepted / engine.stats().drafted)
    assert accepted[1] > 1.2 * accepted[0]


def test_typical_acceptance_obeys_penalties_and_bias(house: Path, model: Decoder, tokenizer: Tokenizer) -> None:
    [[plain]] = Engine(model, tokenizer).generate([PROMPTS[0]], GREEDY)
    config = EngineConfig(speculate="draft", draft_model=str(house), typical_acceptance=True, tools=False)
    engine = Engine(model, tokenizer, config)
    banned = dict.fromkeys(plain.token_ids, -100.0)
    for group in run(engine, SamplingParams(max_tokens=24, temperature=1.0, seed=2, logit_bias=banned)):
        assert not set(group[0].token_ids) & set(banned)


def test_typical_acceptance_is_refused_where_it_would_break_a_promise(
    house: Path, model: Decoder, tokenizer: Tokenizer
) -> None:
    config = EngineConfig(speculate="draft", draft_model=str(house), typical_acceptance=True)
    with pytest.raises(UserError, match="set tools=false"):
        Engine(model, tokenizer, config)
    engine = Engine(model, tokenizer, config.model_copy(update={"tools": False}))
    with pytest.raises(UserError, match="typical_acceptance takes tokens past the grammar"):
        engine.generate([PROMPTS[0]], SamplingParams(grammar=DIGITS))


def test_drafts_are_made_only_for_those_that_have_a_turn(
    house: Path, model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(speculate="draft", draft_model=str(house), max_num_seqs=3)
    engine = Engine(model, tokenizer, config)
    assert engine._speculator is not None
    widths: list[int] = []
    before = engine._speculator.before
    monkeypatch.setattr(engine._speculator, "before", lambda ready: (widths.append(len(ready)), before(ready))[1])
    run(engine, SamplingParams(max_tokens=10, seed=1, n=20))
    assert max(widths) == 3
