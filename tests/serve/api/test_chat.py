"""The exact form of a chat completion, of its chunks, and of /v1/models."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from nanoworks.engine import AsyncEngine, Engine
from nanoworks.serve.app import create_app
from nanoworks.serve.protocol.chat import ChatCompletion, ChatCompletionChunk
from nanoworks.serve.protocol.completions import Completion

USER = [{"role": "user", "content": "hi"}]


def events(url: str, path: str, **body: Any) -> list[dict[str, Any]]:
    text = httpx.post(url + path, json={"stream": True, "temperature": 0, "max_tokens": 6, **body}).text
    *found, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in found]


def test_a_whole_answer_to_the_letter(url: str) -> None:
    body = {"messages": USER, "temperature": 0, "max_tokens": 6, "logprobs": True, "top_logprobs": 1}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body).json()
    ChatCompletion.model_validate(answer)
    assert list(answer) == ["id", "object", "created", "model", "system_fingerprint", "choices", "usage"]
    assert answer["id"].startswith("chatcmpl-")
    [choice] = answer["choices"]
    assert choice.keys() == {"index", "message", "logprobs", "finish_reason"}
    assert choice["message"].keys() - {"nanoworks"} == {"role", "content", "refusal", "annotations"}
    assert choice["logprobs"]["refusal"] is None
    assert choice["logprobs"]["content"][0].keys() == {"token", "logprob", "bytes", "top_logprobs"}


def test_chunks_to_the_letter(url: str) -> None:
    plain = events(url, "/v1/chat/completions", messages=USER)
    first, *middle, last = plain
    for chunk in plain:
        ChatCompletionChunk.model_validate(chunk)
        assert list(chunk) == ["id", "object", "created", "model", "system_fingerprint", "choices"]
        assert chunk["choices"][0].keys() == {"index", "delta", "logprobs", "finish_reason"}
    assert len({(chunk["id"], chunk["created"]) for chunk in plain}) == 1
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in middle)
    assert last["choices"][0]["delta"] == {}
    assert last["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("path", "prompt"), [("/v1/chat/completions", {"messages": USER}), ("/v1/completions", {"prompt": "hi"})]
)
def test_usage_as_openai_streams_it(url: str, path: str, prompt: Any) -> None:
    *chunks, last = events(url, path, **prompt, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 6)
    if path == "/v1/completions":
        for chunk in (*chunks, last):
            Completion.model_validate(chunk)


def test_turns_that_do_not_alternate_are_joined(url: str, random_engine: Engine) -> None:
    messages = [
        {"role": "developer", "content": "a"},
        {"role": "system", "content": "b"},
        {"role": "user", "content": [{"type": "text", "text": "c"}]},
        {"role": "user", "content": "d"},
    ]
    joined = [{"role": "system", "content": "a\n\nb"}, {"role": "user", "content": "c\n\nd"}]
    found = httpx.post(f"{url}/tokenize", json={"messages": messages}).json()["tokens"]
    assert found == random_engine.tokenizer.render_for_completion({"messages": joined})


def test_two_answers_have_the_fingerprint_of_their_model(url: str) -> None:
    found = {events(url, "/v1/completions", prompt=text)[0]["system_fingerprint"] for text in ("a", "b")}
    assert len(found) == 1
    assert found.pop().startswith("fp_")


def test_a_model_tells_where_it_comes_from(random_engine: Engine) -> None:
    from fastapi.testclient import TestClient

    lineage = {"run_id": "r-17", "stage": "sft", "step": 300, "parent": "runs/base/step-900", "data_hash": "ab"}
    with TestClient(create_app(AsyncEngine(random_engine), name="tiny", lineage=lineage)) as client:
        card = client.get("/v1/models/tiny").json()
        assert client.get("/v1/models").json() == {"object": "list", "data": [card]}
        assert (card["object"], card["owned_by"], card["run_id"]) == ("model", "nanoworks", "r-17")
        assert card["lineage"] == {name: value for name, value in lineage.items() if name != "run_id"}
