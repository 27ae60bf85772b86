from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from nanoworks.engine.grammar import Grammar
from nanoworks.serve.app import sampling
from nanoworks.serve.protocol import ChatMessage, ChatRequest

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
    assert request(service_tier="auto", metadata={}, frequency_penalty=0, tools=[], tool_choice="auto") == request()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "at least 1"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "'system', 'developer', 'user' or 'assistant'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only parts"),
        ({"messages": [{"role": "user", "content": 3}]}, "valid string"),
        ({"tools": [{"type": "function"}]}, "tools is not supported"),
        ({"frequency_penalty": 2.5}, "less than or equal to 2"),
        ({"presence_penalty": -3}, "greater than or equal to -2"),
        ({"repetition_penalty": 0}, "greater than 0"),
        ({"logit_bias": {"x": 1}}, "valid integer"),
        ({"logit_bias": {"5": 101}}, "less than or equal to 100"),
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
        ({"n": 1000}, "less than or equal to 64"),
        ({"stop": [""]}, "must not be empty"),
        ({"top_logprobs": 2}, "needs logprobs=true"),
        ({"seed": "x"}, "valid integer"),
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
