"""Bodies that are no request: each gets a 4xx in OpenAI's form, and the server goes on."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

JSON = {"content-type": "application/json"}
CHAT = '{"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2'
POSTS = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize", "/detokenize"]


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b'"text"',
        b"null",
        b"\xff\xfe",
        b"[" * 200_000,
        b'{"a":' * 50_000,
        b'{"model": 3}',
        b"\0",
    ],
)
def test_what_is_no_request(url: str, path: str, body: bytes) -> None:
    response = httpx.post(url + path, content=body, headers=JSON)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ('"seed": ' + "1" * 5000, []),
        ('"seed": 9223372036854775808', ["seed"]),
        ('"temperature": NaN', ["temperature"]),
        ('"temperature": Infinity', ["temperature"]),
        ('"logit_bias": {"65": NaN}', ["logit_bias"]),
        ('"logit_bias": {"-1": 1}', ["logit_bias", "'-1'"]),
        ('"logit_bias": {"999999": 1}', ["999999"]),
        ('"n": 1000000000000', ["n"]),
        ('"max_tokens": 1e400', ["max_tokens"]),
        ('"stop": ' + json.dumps("x" * 5000), ["stop", "4096"]),
        ('"user": ' + json.dumps("x" * 600), ["user", "512"]),
        ('"\\ud800": 1', []),
        ('"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/x"}}}', ["json_schema"]),
        (
            '"response_format": {"type": "json_schema", "json_schema": {"schema": '
            + '{"properties": {"a": ' * 3000
            + "{}"
            + "}}" * 3000
            + "}}",
            [],
        ),
        (
            '"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "string", "pattern": "("}}}',
            ["json_schema"],
        ),
        (
            '"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": '
            + json.dumps(["x" * 100] * 1000)
            + "}}}",
            ["65536"],
        ),
    ],
)
@pytest.mark.parametrize("stream", ["false", "true"])
def test_values_that_are_out_of_bounds(url: str, more: str, words: list[str], stream: str) -> None:
    response = httpx.post(
        f"{url}/v1/chat/completions", content=f'{CHAT}, "stream": {stream}, {more}}}', headers=JSON, timeout=60
    )
    assert response.status_code == 400, response.text
    assert all(word in response.json()["error"]["message"] for word in words), response.text


def test_a_pattern_that_would_explode(url: str) -> None:
    """It is refused, or kept at a bounded cost; the server lives on either way."""
    schema = {"type": "string", "pattern": "(((((a{1,100}){1,100}){1,100}){1,100}){1,100})"}
    wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
    body = {**json.loads(CHAT + "}"), "response_format": wanted}
    assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).status_code in (200, 400)
    assert httpx.get(f"{url}/health").status_code == 200


@pytest.mark.parametrize(
    "fields",
    [
        '"user": "\\ud800"',
        '"stop": ["\\udfff"]',
        '"model": "\\ud800"',
        '"tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": "\\ud800"}}}]',
        '"\\ud800": 1',
    ],
)
def test_half_a_surrogate_pair(url: str, fields: str) -> None:
    """JSON can spell it, UTF-8 cannot: it must not become a failure of ours, in what is read or quoted."""
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", '{"prompt": "x"'), ("/tokenize", "{")):
        separator = ", " if len(body) > 1 else ""
        response = httpx.post(url + path, content=f"{body}{separator}{fields}}}", headers=JSON)
        assert response.status_code == 400
        assert "surrogate" in response.json()["error"]["message"]
    whole = '{"prompt": "\\ud83d\\ude00", "add_special_tokens": false}'  # a whole pair is a character
    assert httpx.post(f"{url}/tokenize", content=whole, headers=JSON).json()["count"] == 4


@pytest.mark.parametrize("depth", [100, 300, 450, 600, 900, 990])
def test_tools_that_are_nested_deeply(url: str, depth: int) -> None:
    schema = '{"a": ' * depth + "{}" + "}" * depth
    tools = f'"tools": [{{"type": "function", "function": {{"name": "f", "parameters": {schema}}}}}]'
    response = httpx.post(f"{url}/v1/chat/completions", content=f"{CHAT}, {tools}}}", headers=JSON)
    assert response.status_code == 400  # too deep, or too long for this context
    assert response.json()["error"]["message"]


def test_a_text_far_too_long_is_refused_before_it_is_tokenized(url: str) -> None:
    text = "x" * 5_000_000
    for path, body, param in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}, "messages"),
        ("/v1/completions", {"prompt": ["x", text]}, "prompt"),
        ("/v1/embeddings", {"input": text}, "input"),
    ):
        error = httpx.post(url + path, json=body, timeout=60).json()["error"]
        assert (error["param"], error["code"]) == (param, "context_length_exceeded")
        assert "5000000 characters" in error["message"]
        assert "128 tokens" in error["message"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
def test_what_is_not_sent_as_json(url: str, kind: str) -> None:
    response = httpx.post(f"{url}/v1/chat/completions", content=CHAT + "}", headers={"content-type": kind})
    assert response.status_code == 400
    assert "application/json" in response.json()["error"]["message"]


def test_the_field_at_fault_is_named(url: str) -> None:
    def param(**fields: Any) -> str:
        body = {"messages": [{"role": "user", "content": "hi"}], **fields}
        return httpx.post(f"{url}/v1/chat/completions", json=body).json()["error"]["param"]

    assert param(messages=[{"role": "wizard", "content": "x"}]) == "messages.0.role"
    assert param(messages=[{"content": "x"}]) == "messages.0.role"
    assert param(messages=None) == "messages"
    assert param(tools=[{"type": "function", "function": {"name": "a b"}}]) == "tools.0.function.name"
    assert param(tool_choice={"type": "function", "function": {}}) == "tool_choice.function.name"
    assert param(stream_options={"usage": True}) == "stream_options.usage"
    assert param(temprature=1) == "temprature"
