"""The conveniences of the official client, which lean on every detail of the answers."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

USER: Any = [{"role": "user", "content": "hi"}]


class Weather(BaseModel):
    city: Literal["Paris", "Rome"]
    degrees: int


class Report(BaseModel):
    days: list[Weather]


@pytest.fixture(scope="module")
def client(serve: Any, make_engine: Any) -> Any:
    with serve(make_engine(context=2048)) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="k") as client:
        yield client


def test_parse_gives_an_object_of_the_class(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="tiny", messages=USER, response_format=Report, max_tokens=150, temperature=1.5, seed=3
    )
    assert isinstance(answer.choices[0].message.parsed, Report)


def test_parse_gives_the_arguments_of_a_call(client: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(Weather)
    answer = client.chat.completions.parse(
        model="tiny", messages=USER, tools=[tool], tool_choice="required", max_tokens=100, seed=1
    )
    [call] = answer.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Weather)


def test_the_stream_helper_puts_an_answer_together(client: openai.OpenAI) -> None:
    fields: Any = {"model": "tiny", "messages": USER, "max_tokens": 150, "seed": 3, "logprobs": True, "top_logprobs": 2}
    fields["response_format"] = Report
    whole = client.chat.completions.parse(**fields)
    with client.chat.completions.stream(**fields, stream_options={"include_usage": True}) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "logprobs.content.delta"} <= kinds
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].logprobs == whole.choices[0].logprobs
    assert final.usage == whole.usage


def test_the_stream_helper_puts_a_call_together(client: openai.OpenAI) -> None:
    fields: Any = {
        "model": "tiny",
        "messages": USER,
        "tools": [openai.pydantic_function_tool(Weather)],
        "tool_choice": {"type": "function", "function": {"name": "Weather"}},
        "max_tokens": 100,
        "seed": 2,
    }
    with client.chat.completions.stream(**fields) as stream:
        deltas = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
        final = stream.get_final_completion()
    assert len(deltas) > 3
    assert isinstance(final.choices[0].message.tool_calls[0].function.parsed_arguments, Weather)


def test_many_at_once(client: openai.OpenAI) -> None:
    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=str(client.base_url), api_key="k") as many:

            async def ask(i: int) -> str:
                stream = await many.chat.completions.create(
                    model="tiny", messages=USER, max_tokens=20, seed=i, stream=True
                )
                return "".join([c.choices[0].delta.content or "" async for c in stream])

            return await asyncio.gather(*(ask(i % 4) for i in range(32)))

    texts = asyncio.run(ask_all())
    assert texts == texts[:4] * 8  # whatever else is in the batch


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"model": "gpt-5"}, openai.NotFoundError),
        ({"temperature": 9}, openai.BadRequestError),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, openai.BadRequestError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_the_clients_own(client: openai.OpenAI, fields: Any, kind: Any, stream: bool) -> None:
    with pytest.raises(kind) as error:
        client.chat.completions.create(**{"model": "tiny", "messages": USER, "stream": stream, **fields})
    assert error.value.type == "invalid_request_error"
    assert error.value.body["message"]
