"""Penalties, bias and minimum lengths, beside transformers and OpenAI's formula; and rows behind drafted tokens."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nanoworks.common.errors import UserError
from nanoworks.engine import Engine, SamplingParams
from nanoworks.engine.adjust import Row, adjust
from nanoworks.engine.grammar import Grammar
from nanoworks.engine.history import History
from nanoworks.engine.sampler import sample
from nanoworks.models import Decoder
from nanoworks.tokenizer import Tokenizer
from tests.engine.statistics import assert_drawn_from, draw, make_row, tokens_drawn

TOKENS = st.lists(st.integers(0, 49), max_size=40)


def adjusted(logits: torch.Tensor, *rows: Row) -> torch.Tensor:
    result, errors = adjust(logits, rows)
    assert not errors
    return result


@settings(deadline=None)  # the first call imports
@given(TOKENS, TOKENS, TOKENS, st.sampled_from([0.5, 1.3]))
def test_repetition_penalty_is_that_of_transformers(
    prompt: list[int], output: list[int], drafted: list[int], penalty: float
) -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(len(output)))
    row = make_row(SamplingParams(repetition_penalty=penalty), prompt=[0, *prompt], output=output, drafted=drafted)
    ids = torch.tensor([[0, *prompt, *output, *drafted]])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    torch.testing.assert_close(adjusted(logits, row), expected)


@given(TOKENS, TOKENS)
def test_frequency_and_presence_are_openais_over_the_output(output: list[int], drafted: list[int]) -> None:
    logits = torch.zeros(2, 50)
    params = SamplingParams(frequency_penalty=0.25, presence_penalty=-1.5)
    row = make_row(params, prompt=list(range(50)), output=output, drafted=drafted)
    plain = make_row(SamplingParams(), prompt=[1], output=output)
    counts = Counter(output + drafted)
    expected = [-0.25 * counts[t] - (-1.5 if counts[t] else 0) for t in range(50)]
    result = adjusted(logits, plain, row)
    assert result[0].tolist() == [0] * 50
    assert result[1].tolist() == pytest.approx(expected)


@given(st.lists(TOKENS, max_size=4), TOKENS)
def test_history_follows_step_by_step(parts: list[list[int]], drafted: list[int]) -> None:
    prompt = [3, 3, 7]
    history, ids = History(len(prompt)), list(prompt)
    for part in parts:
        ids += part
        history.follow(ids)
        history.entries(drafted)  # leaves no trace
    history.follow(ids)
    tokens, counts = history.entries()
    assert dict(zip(tokens.tolist(), counts.tolist(), strict=True)) == {t: ids[3:].count(t) for t in ids}


def test_history_grows_past_its_first_room() -> None:
    history = History(0)
    history.follow(list(range(1000)) * 2)
    tokens, counts = history.entries()
    assert sorted(tokens.tolist()) == list(range(1000))
    assert set(counts.tolist()) == {2.0}


@pytest.mark.parametrize(
    ("params", "warper"),
    [
        (SamplingParams(top_k=7), TopKLogitsWarper(7)),
        (SamplingParams(top_p=0.6), TopPLogitsWarper(0.6)),
        (SamplingParams(min_p=0.1), MinPLogitsWarper(0.1)),
    ],
)
@pytest.mark.parametrize("vocab", [60, 3000])
def test_filters_are_those_of_transformers(params: SamplingParams, warper: object, vocab: int) -> None:
    """With 3,000 flat tokens top_p's cut lies behind the candidates that are sorted first."""
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(0)) * (3 if vocab == 60 else 0.1)
    expected = warper(torch.empty(1, 0, dtype=torch.long), logits.clone())[0].softmax(-1)  # type: ignore[operator]
    tokens = tokens_drawn(logits[0], params, count=20_000)
    assert_drawn_from(expected, tokens)
    assert all(expected[token] > 0 for token in set(tokens))


def test_everything_at_once_in_the_documented_order() -> None:
    torch.manual_seed(0)
    logits = torch.randn(40) * 2
    params = SamplingParams(
        temperature=0.7,
        top_k=20,
        top_p=0.9,
        repetition_penalty=1.2,
        frequency_penalty=0.3,
        presence_penalty=0.2,
        logit_bias={5: 3.0, 6: -100.0},
        min_tokens=4,
    )
    output, ends = [5, 5, 9], [8]
    expected = logits.clone()
    for token in {0, 5, 9}:
        expected[token] = expected[token] / 1.2 if expected[token] > 0 else expected[token] * 1.2
    expected[5] += -0.6 - 0.2 + 3
    expected[9] -= 0.3 + 0.2
    expected[6] -= 100
    expected[8] = -torch.inf
    none = torch.empty(1, 0, dtype=torch.long)
    expected = TopPLogitsWarper(0.9)(none, TopKLogitsWarper(20)(none, expected[None] / 0.7))[0]
    rows = [make_row(params, seed=seed, output=output, ends=ends) for seed in range(20_000)]
    assert_drawn_from(expected.softmax(-1), sample(logits.expand(20_000, -1), rows, vocab_size=40).tokens)


def test_reported_log_probabilities_are_before_penalties_and_bias() -> None:
    logits = torch.randn(5, 30)
    params = SamplingParams(temperature=0, logit_bias={3: 50.0}, frequency_penalty=1, logprobs=1)
    result = draw(logits, params, output=[3])
    assert result.tokens == [3] * 5
    assert result.logprobs == pytest.approx(logits.log_softmax(-1)[:, 3].tolist(), abs=1e-5)
    assert [top[0][0] for top in result.top if top] == logits.argmax(-1).tolist()


def test_the_logits_are_left_as_they_are() -> None:
    logits = torch.randn(3, 30)
    before = logits.clone()
    draw(logits, SamplingParams(top_p=0.5, logit_bias={3: 5.0}, repetition_penalty=2.0))
    assert torch.equal(logits, before)


def test_end_tokens_wait_for_min_tokens() -> None:
    logits = torch.zeros(1, 10)
    logits[0, 4] = 9
    params = SamplingParams(temperature=0, min_tokens=2)
    rows = [make_row(params, output=[1] * done, ends=[4]) for done in range(4)]
    assert [sample(logits, [row], vocab_size=10).tokens[0] == 4 for row in rows] == [False, False, True, True]
    drafted = make_row(params, output=[1], drafted=[1], ends=[4])
    assert sample(logits, [drafted], vocab_size=10).tokens == [4]


def test_a_row_behind_drafted_tokens_is_the_row_behind_known_ones() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 50).expand(200, -1)
    params = SamplingParams(temperature=1.2, repetition_penalty=1.5, frequency_penalty=0.5, presence_penalty=0.5)
    known = [make_row(params, seed=s, prompt=[1, 2], output=[7, 7, 9, 9]) for s in range(200)]
    drafted = [make_row(params, seed=s, prompt=[1, 2], output=[7], drafted=[7, 9, 9]) for s in range(200)]
    assert sample(logits, known, vocab_size=50) == sample(logits, drafted, vocab_size=50)


KINDS = [
    SamplingParams(),
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.7, top_k=5),
    SamplingParams(top_p=0.9),
    SamplingParams(top_p=0.99, temperature=2.0),
    SamplingParams(min_p=0.1, temperature=1.5),
    SamplingParams(top_k=2000, top_p=0.8, frequency_penalty=0.5),
    SamplingParams(repetition_penalty=1.3, logit_bias={4: 2.0}, logprobs=3),
]


@pytest.mark.parametrize("scale", [0.3, 5.0])
def test_a_row_is_bit_equal_alone_and_in_a_batch_of_64(scale: float) -> None:
    """Whatever its neighbours ask for: the widest top_k decides how much of all rows is sorted."""
    torch.manual_seed(1)
    logits = torch.randn(64, 4000) * scale
    rows = [make_row(KINDS[i % len(KINDS)], seed=i, prompt=[4, 5], output=[6, i]) for i in range(64)]
    together = sample(logits, rows, vocab_size=3990)
    for i, row in enumerate(rows):
        alone = sample(logits[i : i + 1].clone(), [row], vocab_size=3990)
        assert (alone.tokens[0], alone.logprobs[0], alone.top[0]) == (
            together.tokens[i],
            together.logprobs[i],
            together.top[i],
        )


def test_a_prompt_token_that_cannot_be_decoded_is_no_error() -> None:
    row = make_row(SamplingParams(repetition_penalty=2.0, temperature=0), prompt=[1, 99])
    assert sample(torch.zeros(1, 100), [row], vocab_size=50).tokens == [0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be above 0"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty=nan must be finite"),
        ({"presence_penalty": float("inf")}, "presence_penalty=inf must be finite"),
        ({"logit_bias": {1: float("inf")}}, "-100 forbids"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens=9 must be from 0 to max_tokens=8"),
        ({"stop": tuple("abcdefghijklmnopq")}, "must be at most 16 strings"),
        ({"stop": ("x" * 5000,)}, "4096 characters at most"),
        ({"stop_ids": tuple(range(2000))}, "must be at most 1024 ids"),
        ({"n": 5000}, "n=5000 must be from 1 to 1024"),
        ({"stop": ("x",), "grammar": Grammar("json_object")}, "would cut the output of a grammar"),
    ],
)
def test_parameters_out_of_bounds_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplingParams(**fields)  # type: ignore[arg-type]


def test_engine_refuses_a_bias_for_no_token(model: Decoder, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="logit_bias names token id 265, outside the vocabulary of 265"):
        Engine(model, tokenizer).generate([[1]], SamplingParams(logit_bias={265: 1.0}))


def test_engine_ends_neither_by_token_nor_by_string_before_min_tokens(model: Decoder, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer)
    bias = {tokenizer.eos_id: 50.0}
    [[by_token]] = engine.generate([[1]], SamplingParams(max_tokens=9, min_tokens=5, logit_bias=bias))
    assert len(by_token.token_ids) == 6
    assert by_token.finish_reason == "stop"
    again = SamplingParams(max_tokens=9, min_tokens=5, logit_bias={ord("a"): 100.0}, stop=("a",))
    [[by_string]] = engine.generate([[1]], again)
    assert (len(by_string.token_ids), by_string.text, by_string.finish_reason) == (5, "aaaa", "stop")


def test_penalties_work_over_the_steps_of_an_engine(model: Decoder, tokenizer: Tokenizer) -> None:
    """With a strong presence penalty no token comes twice."""
    params = SamplingParams(max_tokens=60, temperature=0, presence_penalty=1000.0, ignore_eos=True)
    [[completion]] = Engine(model, tokenizer).generate([[1, 2, 3]], params)
    assert len(set(completion.token_ids)) == 60
