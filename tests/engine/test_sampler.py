from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nanoworks.engine.request import SamplingParams
from nanoworks.engine.sampler import sample, sample_seed, score, uniforms
from tests.engine.statistics import assert_drawn_from, draw, make_row, tokens_drawn

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, -30.0])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_those_of_the_distribution(temperature: float) -> None:
    tokens = tokens_drawn(LOGITS, SamplingParams(temperature=temperature), count=20_000)
    assert_drawn_from((LOGITS / temperature).softmax(-1), tokens)


@pytest.mark.parametrize(
    ("params", "possible"),
    [
        (SamplingParams(top_k=1), {0}),
        (SamplingParams(top_k=3), {0, 1, 4}),
        (SamplingParams(top_k=100), {0, 1, 2, 3, 4}),
        (SamplingParams(top_p=0.01), {0}),
        (SamplingParams(top_p=0.76), {0, 1}),  # 0.563 + 0.207 reach it
        (SamplingParams(top_p=0.78), {0, 1, 4}),
        (SamplingParams(min_p=0.3), {0, 1}),
        (SamplingParams(min_p=1.0), {0}),
        (SamplingParams(top_k=2, top_p=0.8), {0, 1}),
        (SamplingParams(top_k=2, top_p=0.7), {0}),  # of the two that are left, the first alone has 0.73
        (SamplingParams(temperature=1e-30), {0}),
    ],
)
def test_filters_keep_exactly_their_tokens(params: SamplingParams, possible: set[int]) -> None:
    assert set(tokens_drawn(LOGITS, params)) == possible


def test_top_k_keeps_ties() -> None:
    assert set(tokens_drawn(torch.tensor([1.0, 1.0, 1.0, 0.0]), SamplingParams(top_k=2))) == {0, 1, 2}


def test_temperature_zero_is_the_argmax() -> None:
    logits = torch.randn(50, 40)
    assert draw(logits, SamplingParams(temperature=0)).tokens == logits.argmax(-1).tolist()


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(0)
    logits = torch.randn(40, 300) * 3
    kinds = [
        SamplingParams(),
        SamplingParams(temperature=0),
        SamplingParams(top_k=5, temperature=0.7),
        SamplingParams(top_p=0.9),
        SamplingParams(min_p=0.1, temperature=1.5),
    ]
    params = [kinds[i % 5] for i in range(40)]
    together = draw(logits, *params)
    for i in range(40):
        alone = sample(logits[i : i + 1], [make_row(params[i], seed=sample_seed(0, i))], vocab_size=300)
        assert alone.tokens == together.tokens[i : i + 1]
        assert alone.logprobs == together.logprobs[i : i + 1]  # to the last bit


def test_logprobs_are_the_models_own() -> None:
    result = draw(LOGITS.expand(100, -1), SamplingParams(temperature=0.3, top_k=2, logprobs=2))
    expected = LOGITS.log_softmax(-1).tolist()
    assert result.logprobs == pytest.approx([expected[t] for t in result.tokens], abs=1e-6)
    assert result.top[0] is not None
    assert [token for token, _ in result.top[0]] == [0, 1]
    assert [p for _, p in result.top[0]] == pytest.approx(expected[:2], abs=1e-6)


def test_only_those_who_ask_get_top_logprobs() -> None:
    result = draw(LOGITS.expand(3, -1), SamplingParams(), SamplingParams(logprobs=1), SamplingParams(logprobs=99))
    assert [top and len(top) for top in result.top] == [None, 1, 6]


def test_padding_of_the_vocabulary_is_never_chosen_but_counts_in_the_logprob() -> None:
    logits = torch.tensor([[0.0, 0.0, 9.0]]).expand(200, -1)
    for params in (SamplingParams(), SamplingParams(temperature=0), SamplingParams(top_k=1)):
        result = draw(logits, params, vocab_size=2)
        assert set(result.tokens) <= {0, 1}
        assert result.logprobs[0] == pytest.approx(-math.log(2 + math.exp(9)), abs=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=0), SamplingParams(top_p=0.5)])
def test_a_row_that_is_not_finite_shows_and_harms_no_other(bad: float, params: SamplingParams) -> None:
    logits = torch.randn(3, 20)
    good = draw(logits, params)
    logits[1, 4] = bad
    result = draw(logits, params)
    assert math.isnan(result.logprobs[1])
    assert 0 <= result.tokens[1] < 20
    assert (result.tokens[0], result.tokens[2]) == (good.tokens[0], good.tokens[2])


def test_uniforms_are_uniform_and_independent_along_seeds_and_steps() -> None:
    seeds = [sample_seed(1, i) for i in range(200)]
    u = np.stack([uniforms(seeds, [step] * 200) for step in range(200)])
    assert u.dtype == np.float32
    assert 0 <= u.min() < 0.001
    assert 0.999 < u.max() < 1
    assert np.histogram(u, bins=20)[0] == pytest.approx(2000, rel=0.1)
    for other in (u[1:, :] - u[:-1, :], u[:, 1:] - u[:, :-1]):
        assert np.var(other) == pytest.approx(1 / 6, rel=0.03)  # twice the variance of one: no correlation


def test_seeds() -> None:
    assert sample_seed(3, 0) == sample_seed(3, 0)
    assert len({sample_seed(seed, index) for seed in range(-20, 20) for index in range(20)}) == 800
    assert sample_seed(None, 0) != sample_seed(None, 0)
    assert 0 <= sample_seed(10**30, 5) < 2**64


def test_score() -> None:
    logprobs, greedy = score(LOGITS.expand(2, -1), [0, 3])
    assert logprobs == pytest.approx(LOGITS.log_softmax(-1)[[0, 3]].tolist(), abs=1e-6)
    assert greedy == [True, False]
