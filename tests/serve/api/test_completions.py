"""POST /v1/completions through the official client."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from nanoworks.engine import Engine, SamplingParams


def complete(client: openai.OpenAI, prompt: Any = "hello", **fields: Any) -> Any:
    return client.completions.create(model="tiny", prompt=prompt, **{"max_tokens": 12, "temperature": 0, **fields})


def test_the_text_is_the_engines_own(client: openai.OpenAI, random_engine: Engine) -> None:
    tokenizer = random_engine.tokenizer
    answer = complete(client)
    assert (answer.object, answer.model, answer.choices[0].finish_reason) == ("text_completion", "tiny", "length")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 12)  # bos and five bytes
    assert complete(client, tokenizer.encode("hello", bos=True)).choices[0].text == answer.choices[0].text
    assert complete(client, [tokenizer.encode("hello", bos=True)]).choices[0].text == answer.choices[0].text
    bare = complete(client, extra_body={"add_special_tokens": False})
    assert bare.usage.prompt_tokens == 5
    assert bare.choices[0].text == complete(client, tokenizer.encode("hello")).choices[0].text


def test_sixteen_tokens_are_the_default(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="hello", extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 16


@pytest.mark.parametrize("stream", [False, True])
def test_many_prompts_and_samples(client: openai.OpenAI, stream: bool) -> None:
    """Choice i * n + j is sample j of prompt i."""
    prompts = ["one", "two", "three"]
    alone = [complete(client, p, n=2, seed=7, temperature=1).choices for p in prompts]
    expected = [choice.text for choices in alone for choice in choices]
    together = complete(client, prompts, n=2, seed=7, temperature=1, stream=stream)
    if stream:
        texts = [""] * 6
        reasons = []
        for chunk in together:
            texts[chunk.choices[0].index] += chunk.choices[0].text
            reasons += [c.finish_reason for c in chunk.choices if c.finish_reason]
        assert len(reasons) == 6
    else:
        assert [choice.index for choice in together.choices] == list(range(6))
        texts = [choice.text for choice in together.choices]
        assert together.usage.prompt_tokens == 4 + 4 + 6
        assert together.usage.completion_tokens == 6 * 12
    assert texts == expected


def test_echo(client: openai.OpenAI) -> None:
    text = complete(client).choices[0].text
    assert complete(client, echo=True).choices[0].text == "hello" + text
    streamed = "".join(chunk.choices[0].text for chunk in complete(client, echo=True, stream=True))
    assert streamed == "hello" + text
    assert complete(client, echo=True, max_tokens=0).choices[0].text == "hello"


def test_logprobs_are_the_engines(client: openai.OpenAI, random_engine: Engine) -> None:
    tokenizer = random_engine.tokenizer
    ids = tokenizer.encode("hello", bos=True)
    logprobs = complete(client, logprobs=3).choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 12
    assert logprobs.text_offset[0] == 0
    assert logprobs.text_offset == sorted(logprobs.text_offset)
    for value, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert value == max(top.values()) <= 0  # greedy
        assert 1 <= len(top) <= 3
    tokens = complete(client, ids, logprobs=0)
    assert tokens.choices[0].logprobs.token_logprobs == pytest.approx(logprobs.token_logprobs)
    assert all(len(top) == 1 for top in tokens.choices[0].logprobs.top_logprobs)
    chunks = [c.choices[0].logprobs for c in complete(client, logprobs=3, stream=True)]
    assert [t for chunk in chunks if chunk for t in chunk.tokens] == logprobs.tokens
    assert [o for chunk in chunks if chunk for o in chunk.text_offset] == logprobs.text_offset


def test_usage_of_a_stream(client: openai.OpenAI) -> None:
    *chunks, last = complete(client, ["a", "bc"], stream=True, stream_options={"include_usage": True})
    assert all(chunk.usage is None for chunk in chunks)
    assert (last.choices, last.usage.prompt_tokens, last.usage.completion_tokens) == ([], 5, 24)
    options = {"continuous_usage_stats": True}
    counts = [c.usage.completion_tokens for c in complete(client, stream=True, stream_options=options)]
    assert counts == sorted(counts)
    assert counts[-1] == 12


def test_usage_says_what_the_prefix_cache_held(client: openai.OpenAI) -> None:
    prompt = "a prompt that nobody else sends here, longer than a block of the cache"
    first, second = (complete(client, prompt).usage for _ in range(2))
    assert first.prompt_tokens_details.cached_tokens == 0
    assert 0 < second.prompt_tokens_details.cached_tokens < second.prompt_tokens


def test_stop(client: openai.OpenAI) -> None:
    text = complete(client).choices[0].text
    choice = complete(client, stop=text[3]).choices[0]
    assert (choice.text, choice.finish_reason) == (text[: text.index(text[3])], "stop")


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": "x" * 300}, "prompt", ["301 tokens", "128"]),
        ({"prompt": ["ok", "x" * 300]}, "prompt", ["301 tokens", "128"]),
        ({"prompt": []}, "prompt", ["at least 1"]),
        ({"prompt": [[]]}, "prompt.0", []),
        ({"prompt": [1, "x"]}, "prompt", []),
        ({"prompt": [99999]}, None, ["99999", "vocabulary"]),
        ({"prompt": ["x"] * 200}, "prompt", ["200", "at most 128"]),
        ({"prompt": 3}, "prompt", []),
        ({"prompt": "", "add_special_tokens": False}, "prompt", ["empty"]),
        ({"suffix": "end"}, "suffix", []),
        ({"best_of": 3}, None, ["best_of"]),
        ({"logprobs": 21}, "logprobs", ["20"]),
        ({"max_tokens": -1}, "max_tokens", []),
        ({"max_tokens": 10**12}, "max_tokens", []),
        ({"n": 100}, "n", ["64"]),
        ({"n": 5, "prompt": ["x"] * 100}, "n", ["at most 128"]),
        ({"tools": []}, "tools", ["not known"]),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_done(url: str, fields: Any, param: str | None, words: list[str], stream: bool) -> None:
    response = httpx.post(f"{url}/v1/completions", json={"prompt": "hello", "stream": stream, **fields})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert (error["param"] or "").startswith(param or "")
    assert all(word in error["message"] for word in words), error["message"]


def test_one_wrong_prompt_of_many_leaves_nothing_behind(url: str, random_engine: Engine) -> None:
    prompts = [[65] * 4, [99999], [66] * 4]
    assert httpx.post(f"{url}/v1/completions", json={"prompt": prompts}).status_code == 400
    text = httpx.post(f"{url}/v1/completions", json={"prompt": "again", "temperature": 0}).json()["choices"][0]["text"]
    assert not random_engine.has_work
    ids = random_engine.tokenizer.encode("again", bos=True)
    [[expected]] = random_engine.generate([ids], SamplingParams(max_tokens=16, temperature=0))
    assert text == expected.text
