"""What evaluation asks of /v1/completions: the log-probabilities of a prompt's own tokens (`echo` with `logprobs`)."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from nanoworks.engine import Engine

TEXT = "hello, world"


def score(client: openai.OpenAI, prompt: Any, **fields: Any) -> Any:
    arguments = {"max_tokens": 0, "echo": True, "logprobs": 2, "temperature": 0, **fields}
    return client.completions.create(model="tiny", prompt=prompt, **arguments)


def test_a_prompts_tokens_have_the_engines_scores(client: openai.OpenAI, random_engine: Engine) -> None:
    ids = random_engine.tokenizer.encode(TEXT)
    [own] = random_engine.loglikelihood([([random_engine.tokenizer.bos_id], ids)])
    found = score(client, TEXT).choices[0].logprobs  # a text: bos is before it, and not among its tokens
    assert "".join(found.tokens) == TEXT
    assert found.token_logprobs == pytest.approx(own.tokens, abs=1e-4)
    assert found.text_offset == list(range(len(TEXT)))
    for value, top in zip(found.token_logprobs, found.top_logprobs, strict=True):
        assert 2 <= len(top) <= 3  # the two likeliest, and the token itself
        assert value in top.values()
        assert value <= max(top.values())
    greedy = [value == max(top.values()) for value, top in zip(found.token_logprobs, found.top_logprobs, strict=True)]
    assert all(greedy) == own.greedy


def test_nothing_comes_before_the_first_of_given_tokens(client: openai.OpenAI, random_engine: Engine) -> None:
    ids = random_engine.tokenizer.encode(TEXT)
    [own] = random_engine.loglikelihood([(ids[:1], ids[1:])])
    found = score(client, ids).choices[0].logprobs
    assert found.token_logprobs[0] is found.top_logprobs[0] is None
    assert found.token_logprobs[1:] == pytest.approx(own.tokens, abs=1e-4)


@pytest.mark.parametrize("stream", [False, True])
def test_the_answers_tokens_follow(client: openai.OpenAI, stream: bool) -> None:
    prompts = [TEXT, "ab"]
    alone = [score(client, prompt, max_tokens=4, echo=False).choices[0].logprobs for prompt in prompts]
    heads = [score(client, prompt).choices[0].logprobs for prompt in prompts]
    expected = [head.token_logprobs + tail.token_logprobs for head, tail in zip(heads, alone, strict=True)]
    if stream:
        found: list[list[float]] = [[], []]
        for chunk in score(client, prompts, max_tokens=4, stream=True):
            found[chunk.choices[0].index] += chunk.choices[0].logprobs.token_logprobs
    else:
        found = [choice.logprobs.token_logprobs for choice in score(client, prompts, max_tokens=4).choices]
    for got, want in zip(found, expected, strict=True):
        assert got == pytest.approx(want, abs=1e-4)


def test_every_sample_of_a_prompt_has_them(client: openai.OpenAI) -> None:
    choices = score(client, TEXT, max_tokens=3, n=3, seed=1, temperature=1).choices
    prompts = [choice.logprobs.token_logprobs[: len(TEXT)] for choice in choices]
    assert prompts[0] == prompts[1] == prompts[2]
    assert all(len(choice.logprobs.tokens) == len(TEXT) + 3 for choice in choices)
