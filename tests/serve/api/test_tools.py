"""Functions of the client: told to the model, called by it, free and forced, whole and streamed."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from nanoworks.engine import Engine
from nanoworks.serve.answer.tools import HERMES, LLAMA, MISTRAL, CallFormat, FreeCalls, call_format

USER = [{"role": "user", "content": "hi"}]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"enum": [1, 22]}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
WAIT = {"type": "function", "function": {"name": "wait"}}

# What a model writes that was told of both, in one go.
WORDS = ["sure ", "<tool_", 'call>{"name": "add", ', '"arguments": {"a": 1, "b": 22}}', "</tool_call>"]
CALLS = dict(zip(["<|assistant_start|>", *WORDS], [*WORDS, "<|assistant_end|>"], strict=True))


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    arguments = {"tools": [ADD, WAIT], "max_tokens": 60, "messages": USER, **fields}
    return client.chat.completions.create(model="tiny", **arguments)


def joined(stream: Any) -> tuple[str, list[dict[str, str]], str]:
    """Put a stream's choice together: content, calls, finish reason."""
    content, calls, reason = "", [], ""
    for chunk in stream:
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reason = choice.finish_reason or reason
            for call in choice.delta.tool_calls or ():
                if call.id:
                    assert call.index == len(calls)
                    assert call.type == "function"
                    calls.append({"id": call.id, "name": call.function.name, "arguments": ""})
                calls[call.index]["arguments"] += call.function.arguments
    return content, calls, reason


@pytest.fixture(scope="module")
def roomy_client(serve: Any, make_engine: Any) -> Any:
    with serve(make_engine(context=2048)) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        yield client


# ------------------------------------------------------------------------------------------------ free calls


def test_a_call_that_the_model_makes(serve: Any, scripted_engine: Any) -> None:
    engine: Engine = scripted_engine(CALLS, context=2048, words=WORDS)
    with serve(engine) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        choice = ask(client).choices[0]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "sure")
        [call] = choice.message.tool_calls
        assert (call.type, call.function.name) == ("function", "add")
        assert json.loads(call.function.arguments) == {"a": 1, "b": 22}
        content, [streamed], reason = joined(ask(client, stream=True))
        assert (content, reason) == ("sure", "tool_calls")
        assert (streamed["name"], streamed["arguments"]) == ("add", call.function.arguments)

        # The same words mean nothing without tools, with tool_choice="none", or where there is no such function.
        text = "".join(WORDS)
        for fields in ({"tools": None}, {"tool_choice": "none"}, {"tools": [WAIT]}):
            choice = ask(client, **fields).choices[0]
            assert (choice.message.content, choice.message.tool_calls) == (text, None)
            assert choice.finish_reason == "stop"

        # The client sends the call back with its result, in the official client's own objects.
        result = {"role": "tool", "tool_call_id": call.id, "content": "23"}
        again = ask(client, messages=[*USER, ask(client).choices[0].message, result])
        assert again.choices[0].finish_reason == "tool_calls"


def test_what_a_model_without_a_template_for_tools_is_told(client: openai.OpenAI, random_engine: Engine) -> None:
    """Functions in the system text, calls and results as text: turns alternate, as this format needs it."""
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 1}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
        {"role": "tool", "tool_call_id": "c1", "content": "two"},
    ]
    url = str(client.base_url).removesuffix("/v1/")
    ids = httpx.post(f"{url}/tokenize", json={"messages": messages, "tools": [ADD]}).json()["tokens"]
    told = random_engine.tokenizer.decode(ids)
    assert json.dumps(ADD["function"]) in told
    assert told.index("Add two numbers.") < told.index("Be brief.") < told.index("1+1?")
    assert told.count('<tool_call>{"name": "add", "arguments": {"a": 1, "b": 1}}</tool_call>') == 2
    assert "<tool_response>\n2\n</tool_response>\n\n<tool_response>\ntwo\n</tool_response><|user_end|>" in told
    assert told.endswith("<|assistant_start|>")


@pytest.mark.parametrize(
    ("form", "text", "content", "calls"),
    [
        (HERMES, 'a <b> \n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>', "a <b>", ['{"a": 1}']),
        (
            HERMES,
            '<tool_call>{"name":"add","arguments":{}}</tool_call>\n<tool_call>{"name":"add"}</tool_call>',
            "",
            ["{}", "{}"],
        ),
        (HERMES, '<tool_call>{"name": "sub"}</tool_call> x', '<tool_call>{"name": "sub"}</tool_call> x', []),
        (HERMES, "<tool_call>no JSON</tool_call>", "<tool_call>no JSON</tool_call>", []),
        (HERMES, 'cut <tool_call>{"name": "add", "argum', 'cut <tool_call>{"name": "add", "argum', []),
        (HERMES, "1 <tool 2 <tool_call", "1 <tool 2 <tool_call", []),
        (MISTRAL, '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}, {"name": "add"}]', "", ['{"a": 1}', "{}"]),
        (LLAMA, '{"name": "add", "parameters": {"a": 1}}', "", ['{"a": 1}']),
        (LLAMA, '<|python_tag|>{"name": "add", "parameters": {"a": 1}}', "", ['{"a": 1}']),
        (LLAMA, '{"a": "document"}', '{"a": "document"}', []),
        (LLAMA, 'text {"name": "add"}', 'text {"name": "add"}', []),
    ],
)
def test_calls_are_found_wherever_the_text_is_cut(form: CallFormat, text: str, content: str, calls: list[str]) -> None:
    for size in (1, 2, 3, 7, len(text)):
        reader = FreeCalls(form, ["add"])
        found = [piece for at in range(0, len(text), size) for piece in reader.feed(text[at : at + size])]
        found += reader.finish()
        assert "".join(piece.get("content", "") for piece in found) == content
        made = [call for piece in found for call in piece.get("tool_calls", ())]
        assert [call["function"]["arguments"] for call in made] == calls
        assert [call["index"] for call in made] == list(range(len(calls)))
        assert reader.reason("stop") == ("tool_calls" if calls else "stop")
        assert reader.reason("length") == "length"


def test_one_call_where_no_more_are_wanted() -> None:
    reader = FreeCalls(HERMES, ["add"], parallel=False)
    found = reader.feed('<tool_call>{"name": "add"}</tool_call>' * 3) + reader.finish()
    assert [len(piece["tool_calls"]) for piece in found] == [1]


def test_the_template_says_how_calls_look() -> None:
    assert call_format(None) is HERMES
    assert call_format("{{ '<tool_call>' }}") is HERMES
    assert call_format("{{ '[TOOL_CALLS]' }}") is MISTRAL
    assert call_format("""{{ '"parameters": ' }}""") is LLAMA


# ---------------------------------------------------------------------------------------------- forced calls


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_named_function_is_called(roomy_client: openai.OpenAI, seed: int) -> None:
    choice = {"type": "function", "function": {"name": "add"}}
    answer = ask(roomy_client, tool_choice=choice, seed=seed, temperature=2).choices[0]
    [call] = answer.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert (call.function.name, answer.message.content, answer.finish_reason) == ("add", None, "stop")
    assert isinstance(arguments["a"], int)
    assert arguments["b"] in (1, 22)
    streamed = joined(ask(roomy_client, tool_choice=choice, seed=seed, temperature=2, stream=True))
    assert (streamed[0], streamed[1][0]["arguments"], streamed[2]) == ("", call.function.arguments, "stop")


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_some_function_is_called(roomy_client: openai.OpenAI, seed: int) -> None:
    answer = ask(roomy_client, tool_choice="required", seed=seed, temperature=2).choices[0]
    [call] = answer.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {"add": {"a", "b"}, "wait": set()}[call.function.name]
    assert answer.finish_reason == "tool_calls"
    content, [streamed], reason = joined(
        ask(roomy_client, tool_choice="required", seed=seed, temperature=2, stream=True)
    )
    assert (content, reason) == ("", "tool_calls")
    assert (streamed["name"], streamed["arguments"]) == (call.function.name, call.function.arguments)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "sub"}}}, ["'sub'", "add, wait"]),
        ({"tool_choice": "required", "tools": None}, ["required", "tools"]),
        ({"tool_choice": "sometimes"}, ["tool_choice"]),
        ({"tools": [{**ADD, "type": "custom"}]}, ["tools.0.type"]),
        ({"tools": [ADD, ADD]}, ["same name"]),
        (
            {
                "tool_choice": {"type": "function", "function": {"name": "bad"}},
                "tools": [{"type": "function", "function": {"name": "bad", "parameters": {"type": "wrong"}}}],
            },
            ["wrong"],
        ),
        (
            {
                "tool_choice": "required",
                "tools": [{"type": "function", "function": {"name": "big", "parameters": {"enum": ["x" * 70_000]}}}],
            },
            [],
        ),
    ],
)
def test_tools_that_cannot_be(roomy_client: openai.OpenAI, fields: Any, words: list[str]) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        ask(roomy_client, **fields)
    assert all(word in error.value.message for word in words), error.value.message
