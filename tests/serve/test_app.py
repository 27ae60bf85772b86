"""The server as its clients see it: the official openai client and raw HTTP against a live uvicorn."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import torch

from nanoworks.engine import Engine, Request
from nanoworks.serve.settings import ServerSettings

USER = [{"role": "user", "content": "hi"}]
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def url(serve: Any, random_engine: Engine) -> Iterator[str]:
    with serve(random_engine) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(model="tiny", messages=USER, **{"max_tokens": 12, **fields})


# ---------------------------------------------------------------------------------------------- answers


def test_a_whole_answer(client: openai.OpenAI, random_engine: Engine) -> None:
    answer = complete(client, temperature=0)
    prompt = random_engine.tokenizer.render_for_completion({"messages": USER})
    assert answer.object == "chat.completion"
    assert answer.model == "tiny"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == len(prompt) + 12
    again = complete(client, temperature=0)
    assert again.choices[0].message.content == answer.choices[0].message.content
    assert again.id != answer.id


def test_a_stream_is_the_same_answer_in_pieces(client: openai.OpenAI) -> None:
    whole = complete(client, seed=5, n=2)
    stream = list(complete(client, seed=5, n=2, stream=True))
    assert [c.choices[0].delta.role for c in stream[:2]] == ["assistant", "assistant"]
    assert len(stream) > 6
    assert all(chunk.usage is None for chunk in stream)
    for index in (0, 1):
        choices = [c for chunk in stream for c in chunk.choices if c.index == index]
        assert "".join(c.delta.content or "" for c in choices) == whole.choices[index].message.content
        assert [c.finish_reason for c in choices if c.finish_reason] == ["length"]
        assert choices[-1].finish_reason == "length"


def test_usage_in_a_stream_when_asked_for(client: openai.OpenAI) -> None:
    *_, last = complete(client, temperature=0, stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage.completion_tokens == 12


def test_the_bytes_of_a_stream(url: str) -> None:
    body = {"messages": USER, "max_tokens": 2, "stream": True}
    response = httpx.post(f"{url}/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_seed_and_n(client: openai.OpenAI) -> None:
    def texts(seed: int) -> list[str]:
        return [choice.message.content for choice in complete(client, seed=seed, n=3).choices]

    assert texts(1) == texts(1)
    assert texts(1) != texts(2)
    assert len(set(texts(1))) > 1


def test_stop(client: openai.OpenAI) -> None:
    text = complete(client, temperature=0).choices[0].message.content
    stop = text[2:4]
    choice = complete(client, temperature=0, stop=[stop, "never in there"]).choices[0]
    assert choice.message.content == text[: text.index(stop)]
    assert choice.finish_reason == "stop"


def test_logprobs(client: openai.OpenAI) -> None:
    greedy = complete(client, temperature=0, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(greedy) == 12
    for entry in greedy:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == entry.logprob <= 0
        assert entry.top_logprobs[0].bytes == entry.bytes
    plain = complete(client, temperature=0, logprobs=True).choices[0].logprobs.content
    assert [entry.logprob for entry in plain] == pytest.approx([entry.logprob for entry in greedy])
    assert [entry.top_logprobs for entry in plain] == [[]] * 12
    stream = complete(client, temperature=0, logprobs=True, stream=True)
    streamed = [e for chunk in stream for c in chunk.choices if c.logprobs for e in c.logprobs.content]
    assert [entry.bytes for entry in streamed] == [entry.bytes for entry in plain]


def test_a_schema_gives_a_document_of_it(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string"}, "degrees": {"type": "integer"}},
        "required": ["city", "degrees"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "weather", "schema": schema, "strict": True}}
    answer = complete(client, max_tokens=40, n=4, response_format=wanted)
    for choice in answer.choices:
        document = json.loads(choice.message.content)
        assert (list(document), choice.finish_reason) == (["city", "degrees"], "stop")
        assert isinstance(document["degrees"], int)
    answer = complete(client, response_format={"type": "json_object"})
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_cannot_be_kept_is_the_clients_mistake(url: str, stream: bool) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "wrong"}}}
    body = {"messages": USER, "response_format": wanted, "stream": stream}
    response = httpx.post(f"{url}/v1/chat/completions", json=body)
    assert response.status_code == 400  # a stream begins with its first token
    error = response.json()["error"]
    assert error["param"] == "response_format"
    assert "wrong" in error["message"]


def test_a_bias_decides(client: openai.OpenAI) -> None:
    answer = complete(client, logit_bias={str(ord("z")): 100}, frequency_penalty=-2)
    assert answer.choices[0].message.content == "z" * 12


def test_who_asks_and_how_urgently_reaches_the_scheduler(
    client: openai.OpenAI, random_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Request] = []
    add = random_engine.add
    monkeypatch.setattr(random_engine, "add", lambda request: (seen.append(request), add(request))[1])
    complete(client)
    complete(client, user="ann", prompt_cache_key="secret", extra_body={"priority": 3})
    complete(client, user="bob", stream=True, extra_body={"priority": -2}).response.read()
    assert [(r.client, r.cache_salt, r.priority) for r in seen] == [("", "", 0), ("ann", "secret", -3), ("bob", "", 2)]


def test_only_one_cache_key_shares_a_prefix(client: openai.OpenAI, random_engine: Engine) -> None:
    long = [{"role": "user", "content": "a conversation that begins alike " * 2}]
    hits = []
    for key in ("one", "one", "two", "two"):
        client.chat.completions.create(model="tiny", messages=long, max_tokens=2, prompt_cache_key=key)
        hits.append(random_engine.stats().prefix_hits)
    assert hits[0] < hits[1] == hits[2] < hits[3]


def test_an_answer_ends_with_the_context(client: openai.OpenAI) -> None:
    for limit in ({"max_tokens": 100_000}, {"max_tokens": None, "max_completion_tokens": None}):
        answer = complete(client, seed=1, logit_bias=None, **limit)
        assert answer.usage.total_tokens <= 128


# ---------------------------------------------------------------------------------------------- tool calls


def test_tool_calls_are_beside_the_text(serve: Any, calculating_engine: Engine) -> None:
    parts = [
        {"type": "text", "text": "="},
        {"type": "python", "text": "2*3"},
        {"type": "python_output", "text": "6"},
        {"type": "text", "text": "!"},
    ]
    with serve(calculating_engine) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        message = complete(client).choices[0].message
        assert message.content == "=!"
        assert message.nanoworks == {"parts": parts}

        streamed: list[tuple[str, str]] = []
        for chunk in complete(client, stream=True):
            delta = chunk.choices[0].delta
            if delta.content:
                streamed.append(("text", delta.content))
            if tool := getattr(delta, "nanoworks", None):
                streamed.append((tool["type"], tool["text"]))
        assert "".join(text for kind, text in streamed if kind == "python") == "2*3"
        assert [kind for kind, _ in streamed] == ["text", *["python"] * 3, "python_output", "text"]

        # The client sends back what it got, and the model reads its own call.
        history = [*USER, message, {"role": "user", "content": "again"}]
        answer = client.chat.completions.create(model="tiny", messages=history)
        house = [*USER, {"role": "assistant", "content": parts}, {"role": "user", "content": "again"}]
        prompt = calculating_engine.tokenizer.render_for_completion({"messages": house})
        assert answer.usage.prompt_tokens == len(prompt)


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"messages": []}, 400, ["messages", "at least 1"]),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, 400, ["messages.0.role", "'user'"]),
        ({"messages": [*USER, {"role": "system", "content": "x"}, *USER]}, 400, ["message 1", "'assistant' is due"]),
        ({"n": 65}, 400, ["n", "64"]),
        ({"messages": [*USER, {"role": "assistant", "content": "yes"}]}, 400, ["last message"]),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, 400, ["304 tokens", "128"]),
        ({"temperature": -1}, 400, ["temperature", "0"]),
        ({"temprature": 1}, 400, ["temprature", "not known"]),
        ({"model": "gpt-5"}, 404, ["'gpt-5'", "'tiny'"]),
    ],
)
def test_bad_requests(url: str, fields: dict[str, Any], status: int, words: list[str], stream: bool) -> None:
    body = json.dumps({"messages": USER, "stream": stream, **fields})
    response = httpx.post(f"{url}/v1/chat/completions", content=body, headers=JSON)
    error = response.json()["error"]
    assert response.status_code == status
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert all(word in error["message"] for word in words), error["message"]


def test_a_prompt_that_is_too_long_has_the_code_clients_look_for(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x" * 300}])
    assert error.value.code == "context_length_exceeded"


def test_other_errors_have_the_same_form(url: str) -> None:
    for response, status in (
        (httpx.post(f"{url}/v1/chat/completions", content=b"{", headers=JSON), 400),
        (httpx.get(f"{url}/v1/nothing"), 404),
        (httpx.get(f"{url}/v1/chat/completions"), 405),
        (httpx.get(f"{url}/v1/models/gpt-5"), 404),
    ):
        assert response.status_code == status
        assert response.json()["error"]["message"]


def test_a_model_that_computes_nonsense(serve: Any, make_engine: Any) -> None:
    """Its logits are not finite: a 500 with a body, in a stream too, which has not begun by then."""
    engine = make_engine(context=128)
    with torch.no_grad():
        engine.model.head.lm_head.weight.fill_(float("nan"))
    with serve(engine) as url:
        for stream in (False, True):
            response = httpx.post(f"{url}/v1/chat/completions", json={"messages": USER, "stream": stream})
            assert response.status_code == 500
            assert response.json()["error"]["type"] == "server_error"


def test_an_engine_that_breaks_is_not_healthy(serve: Any, make_engine: Any, caplog: Any) -> None:
    engine = make_engine(context=128)
    engine._runner.model.head = None
    with serve(engine) as url:
        assert httpx.get(f"{url}/health").status_code == 200
        response = httpx.post(f"{url}/v1/chat/completions", json={"messages": USER})
        assert response.status_code == 500
        assert "NoneType" not in response.text
        assert "NoneType" in caplog.text
        assert httpx.get(f"{url}/health").status_code == 503


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_stops_ends_long_answers_with_an_error(
    serve: Any, endless_engine: Engine, stream: bool, caplog: Any
) -> None:
    before = endless_engine.stats().tokens_generated
    with ThreadPoolExecutor() as pool:
        with serve(endless_engine, ServerSettings(drain_seconds=0)) as url:
            body = {"messages": USER, "stream": stream}
            asked = pool.submit(httpx.post, f"{url}/v1/chat/completions", json=body, timeout=60)
            while endless_engine.stats().tokens_generated == before:
                time.sleep(0.01)
            time.sleep(0.2)  # the stream has begun
        response = asked.result()
    assert response.status_code == (200 if stream else 503)
    assert '"message":"the server is stopping"' in response.text
    assert "Traceback" not in caplog.text


def test_a_request_too_many_is_told_to_come_back(
    serve: Any, endless_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endless_engine, "config", endless_engine.config.model_copy(update={"max_queue": 1}))
    monkeypatch.setattr(endless_engine._scheduler, "max_num_seqs", 1)
    body = {"messages": USER, "stream": True}
    at_once = ServerSettings(drain_seconds=0)  # for the two that never end
    with ThreadPoolExecutor() as pool, serve(endless_engine, at_once) as url:
        for running, waiting in ((1, 0), (1, 1)):
            pool.submit(httpx.post, f"{url}/v1/chat/completions", json=body, timeout=60)
            while (stats := endless_engine.stats()) and (stats.running, stats.waiting) != (running, waiting):
                time.sleep(0.01)
        for stream in (False, True):
            refused = httpx.post(f"{url}/v1/chat/completions", json={**body, "stream": stream})
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "1"
            error = refused.json()["error"]
            assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
            assert error["message"] == "1 requests wait already and the limit is 1; try again later"


# ------------------------------------------------------------------------------------- a client that leaves


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_request(serve: Any, endless_engine: Engine, stream: bool) -> None:
    before = endless_engine.stats().tokens_generated
    with serve(endless_engine) as url:
        body = {"messages": USER, "stream": stream, "temperature": 0}
        if stream:
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response:
                next(line for line in response.iter_lines() if '"content":"b"' in line)
                assert endless_engine.has_work
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/v1/chat/completions", json=body, timeout=httpx.Timeout(60, read=0.5))
        while endless_engine.has_work:
            time.sleep(0.02)
        assert 0 < endless_engine.stats().tokens_generated - before < 15_000  # of the 20,000 it would have been
        short = {**body, "stream": False, "max_tokens": 4}
        assert httpx.post(f"{url}/v1/chat/completions", json=short).json()["choices"]


# ---------------------------------------------------------------------------------------------- the rest


def test_models_and_health(client: openai.OpenAI, url: str) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.max_model_len) == ("tiny", 128)
    assert client.models.retrieve("tiny").id == "tiny"
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
