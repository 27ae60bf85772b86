"""Helpers for tests of sampling: rows without an engine, and a test of what was drawn."""

from __future__ import annotations

from collections.abc import Sequence as ListOf

import numpy as np
from torch import Tensor

from nanoworks.engine.adjust import Row
from nanoworks.engine.request import Request, SamplingParams
from nanoworks.engine.sampler import Samples, sample, sample_seed
from nanoworks.engine.sequence import Sequence

LIMIT = 4.0
"""In standard deviations: one test in 30,000 fails by chance, and ours draw the same numbers every time."""


def chi_square(probabilities: Tensor, tokens: ListOf[int]) -> float:
    """Return how far `tokens` are from draws of `probabilities` (V,): the chi-square statistic as standard deviations
    (Wilson and Hilferty, https://doi.org/10.1073/pnas.17.12.684). Tokens expected fewer than 5 times count as one."""
    expected = probabilities.double().numpy() / float(probabilities.double().sum()) * len(tokens)
    found = np.bincount(tokens, minlength=len(expected)).astype(float)
    rare = expected < 5
    if expected[rare].sum() > 0:
        expected = np.append(expected[~rare], expected[rare].sum())
        found = np.append(found[~rare], found[rare].sum())
    else:
        assert found[rare].sum() == 0, "an impossible token was drawn"
        expected, found = expected[~rare], found[~rare]
    freedom = len(expected) - 1
    assert freedom > 0, "too few draws to tell anything"
    statistic = ((found - expected) ** 2 / expected).sum() / freedom
    return float((np.cbrt(statistic) - (1 - 2 / (9 * freedom))) / np.sqrt(2 / (9 * freedom)))


def assert_drawn_from(probabilities: Tensor, tokens: ListOf[int]) -> None:
    """Fail unless `tokens` look like draws of `probabilities` (V,)."""
    deviation = chi_square(probabilities, tokens)
    assert deviation < LIMIT, f"the draws are {deviation:.1f} standard deviations off"


def make_row(
    params: SamplingParams,
    *,
    seed: int = 0,
    prompt: ListOf[int] = (0,),
    output: ListOf[int] = (),
    drafted: ListOf[int] = (),
    ends: ListOf[int] = (),
) -> Row:
    """Return a row of a sequence that has already had `output`."""
    sequence = Sequence(
        Request(list(prompt), params),
        0,
        max_tokens=params.max_tokens,
        stop_ids=frozenset(ends),
        seed=seed,
        text=None,
        tool=None,
    )
    sequence.ids += output
    sequence.completion.token_ids += output
    return Row(sequence, tuple(drafted))


def draw(
    logits: Tensor, *params: SamplingParams, seed: int = 0, output: ListOf[int] = (), vocab_size: int = 0
) -> Samples:
    """Sample each row of `logits` by its own of `params`, or all by one; each row is a sample of its own."""
    each = list(params) * (len(logits) if len(params) == 1 else 1)
    rows = [make_row(p, seed=sample_seed(seed, i), output=output) for i, p in enumerate(each)]
    return sample(logits, rows, vocab_size=vocab_size or logits.size(-1))


def tokens_drawn(logits: Tensor, params: SamplingParams, *, count: int = 4000) -> list[int]:
    """Draw from one row of logits many times."""
    return draw(logits.expand(count, -1), params, seed=7).tokens
