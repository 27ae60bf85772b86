from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

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
    assert request(user="me", metadata={}, frequency_penalty=0, tools=[], tool_choice="auto") == request()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "at least 1"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "'system', 'developer', 'user' or 'assistant'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only parts"),
        ({"messages": [{"role": "user", "content": 3}]}, "valid string"),
        ({"frequency_penalty": 0.5}, "frequency_penalty is not supported"),
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
