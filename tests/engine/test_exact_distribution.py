"""Speculation keeps the distribution: draws of the engine against the model's own probabilities, all enumerated."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch

from nanoworks.checkpoint import save_checkpoint
from nanoworks.checkpoint.medusa import save_heads
from nanoworks.engine import Engine, EngineConfig, SamplingParams
from nanoworks.engine.proposers.ngram import NgramProposer
from nanoworks.models import Decoder
from nanoworks.nn.context import DenseContext
from nanoworks.nn.medusa import MedusaHeads
from tests.engine.statistics import assert_drawn_from, chi_square

VOCAB = 12
PROMPT = [1, 2, 3, 4, 1, 2, 5, 4, 1, 2]
DRAWS = 1000
SEEDS = range(6)


@pytest.fixture(scope="module")
def small(new_model: Callable[..., Decoder]) -> Decoder:
    model = new_model(vocab_size=VOCAB)
    with torch.no_grad():
        model.head.lm_head.weight.mul_(4)  # some tokens are likely, none is certain
    return model


@pytest.fixture(scope="module")
def run(small: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as its own draft, whose likeliest token is often not the one drawn, and heads that know nothing."""
    heads = MedusaHeads(32, 2)
    run = tmp_path_factory.mktemp("small") / "run"
    with save_checkpoint(run, small, None, metadata={}) as scratch:
        save_heads(scratch, heads, small, ranks=[[0.4, 0.3, 0.2], [0.4, 0.3, 0.2]])
    return run


@torch.no_grad()
def exact(model: Decoder, temperature: float = 1.0) -> torch.Tensor:
    """(VOCAB ** 3,) probability of each continuation of PROMPT by three tokens."""
    total = torch.zeros(1)
    for length in range(3):  # of what comes before the token
        ends = torch.tensor(list(product(range(VOCAB), repeat=length)), dtype=torch.long).view(VOCAB**length, length)
        tokens = torch.cat((torch.tensor(PROMPT).expand(len(ends), -1), ends), 1)
        logits = model.head(model(tokens, DenseContext(tokens)))[:, -1] / temperature
        total = (total[:, None] + logits.log_softmax(-1)).flatten()
    return total.exp()


@pytest.mark.parametrize("speculate", ["none", "ngram", "draft", "medusa"])
def test_continuations_come_as_often_as_the_model_says(small: Decoder, run: Path, speculate: str) -> None:
    config = EngineConfig(speculate=speculate, draft_model=str(run), max_num_seqs=500)  # type: ignore[arg-type]
    engine = Engine(small, None, config)
    if engine._speculator is not None:
        engine._speculator.length.limits = lambda sequences: [4] * len(sequences)  # type: ignore[method-assign]
        if isinstance(engine._speculator.proposer, NgramProposer):
            engine._speculator.proposer.shortest = 1
    params = [SamplingParams(max_tokens=4, n=DRAWS, seed=seed) for seed in SEEDS]
    drawn = [c.token_ids for group in engine.generate([PROMPT] * len(SEEDS), params) for c in group]
    codes = [(a * VOCAB + b) * VOCAB + c for a, b, c, _ in drawn]
    expected = exact(small)
    assert_drawn_from(expected, codes)
    assert chi_square(exact(small, 1.1), codes) > 4, "so many draws tell another temperature"
    if engine._speculator is not None:
        speculator = engine._speculator
        assert 0 < speculator.accepted < speculator.drafted
