from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from nanoworks.engine.grammar import Grammar
from nanoworks.serve.protocol.chat import ChatMessage, ChatRequest
from nanoworks.serve.routes.chat import sampling

TOOL = {"type": "function", "function": {"name": "look_up"}}
MESSAGES = [{"role": "user", "content": "hi"}]


def request(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": MESSAGES, **fields})


def test_null_counts_as_not_given() -> None:
    assert request(temperature=None, n=None, stop=None, stream=None) == request()


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert ChatMessage.model_validate({"role": "user", "content": parts}).content == "ab"


def test_one_stop_string_is_a_list_of_one() -> None:
    assert request(stop="x").stop == ["x"]


def test_bookkeeping_and_neutral_values_are_accepted() -> None:
    body = request(service_tier="auto", metadata={"a": "b"}, store=True, functions=[], modalities=["text"])
    assert sampling(body, 100) == sampling(request(), 100)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "at least 1"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "'developer', 'user', 'assistant' or 'tool'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only parts"),
        ({"messages": [{"role": "user", "content": 3}]}, "valid string"),
        ({"messages": [{"role": "user", "content": None}]}, "content must be a string"),
        ({"messages": [{"role": "tool", "content": "3"}]}, "needs tool_call_id"),
        ({"tools": [{"type": "function"}]}, "Field required"),
        ({"tools": [{"type": "function", "function": {"name": "two words"}}]}, "should match pattern"),
        ({"tools": [TOOL, TOOL]}, "same name"),
        ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "tools cannot be called"),
        ({"tools": [TOOL] * 129}, "at most 128"),
        ({"functions": [{}]}, "at most 0"),
        ({"modalities": ["audio"]}, "'text'"),
        ({"frequency_penalty": 2.5}, "less than or equal to 2"),
        ({"presence_penalty": -3}, "greater than or equal to -2"),
        ({"repetition_penalty": 0}, "greater than 0"),
        ({"logit_bias": {"x": 1}}, "'x' is not a token id"),
        ({"logit_bias": {"5": 101}}, "from -100 to 100"),
        ({"min_tokens": -1}, "greater than or equal to 0"),
        ({"response_format": {"type": "xml"}}, "'text', 'json_object' or 'json_schema'"),
        ({"response_format": {"type": "json_schema"}}, "json_schema is needed"),
        ({"response_format": {"type": "text", "json_schema": {"schema": {}}}}, "and only there"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "Field required"),
        ({"temprature": 1}, "Extra inputs"),
        ({"temperature": -1}, "greater than or equal to 0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "greater than 0"),
        ({"max_tokens": 0}, "greater than or equal to 1"),
        ({"n": 2000}, "less than or equal to 1024"),
        ({"stop": [""]}, "must not be empty"),
        ({"top_logprobs": 2}, "needs logprobs=true"),
        ({"seed": "x"}, "valid integer"),
        ({"max_tokens": "5"}, "valid integer"),
        ({"stream": 1}, "valid boolean"),
        ({"stop": ["x"] * 17}, "at most 16"),
    ],
)
def test_what_cannot_be_done_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        request(**fields)


def test_sampling_parameters_reach_the_engine() -> None:
    body = request(
        frequency_penalty=0.5,
        presence_penalty=-1,
        repetition_penalty=1.2,
        logit_bias={"7": -100},
        min_tokens=3,
        response_format={"type": "json_object"},
    )
    params = sampling(body, 100)
    assert (params.frequency_penalty, params.presence_penalty, params.repetition_penalty) == (0.5, -1, 1.2)
    assert (params.logit_bias, params.min_tokens) == ({7: -100}, 3)
    assert params.grammar == Grammar("json_object")


def test_a_schema_comes_out_of_openais_wrapping() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    wrapped = {"name": "a", "strict": True, "schema": schema}
    body = request(response_format={"type": "json_schema", "json_schema": wrapped})
    assert sampling(body, 100).grammar == Grammar.json_schema(schema)


def test_an_answer_that_comes_back_keeps_its_tool_calls_unless_it_was_edited() -> None:
    parts = [
        {"type": "text", "text": "6 is "},
        {"type": "python", "text": "2*3"},
        {"type": "python_output", "text": "6"},
        {"type": "text", "text": "right"},
    ]
    message = {"role": "assistant", "content": "6 is right", "nanoworks": {"parts": parts}, "refusal": None}
    assert ChatMessage.model_validate(message).in_house_form() == {"role": "assistant", "content": parts}
    edited = ChatMessage.model_validate({**message, "content": "7"}).in_house_form()
    assert edited == {"role": "assistant", "content": "7"}


def test_developer_is_the_new_name_of_system() -> None:
    assert ChatMessage(role="developer", content="x").in_house_form() == {"role": "system", "content": "x"}
