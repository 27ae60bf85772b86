"""From a chat request to the token ids that ask for its answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from nanoworks.common.errors import UserError
from nanoworks.engine.grammar import Grammar, grammar_for_tools
from nanoworks.serve.answer.tools import CallFormat, ForcedCall, FreeCalls, ToolReader, call_format
from nanoworks.serve.errors import ApiError
from nanoworks.serve.protocol.chat import ChatMessage, ChatRequest, Tool, ToolChoice
from nanoworks.tokenizer import Tokenizer

_TOLD = """\
You can call these functions; each line is one, with its parameters as a JSON schema:
{functions}
To call one, write <tool_call>{{"name": "its name", "arguments": {{...}}}}</tool_call> and end your answer."""


class ToolUse:
    """What a request says of tools: `tools` that the model is told of, the `grammar` of a call that is forced."""

    def __init__(self, body: ChatRequest, tokenizer: Tokenizer) -> None:
        """ApiError 400 when `tool_choice` and `tools` do not fit."""
        choice = body.tool_choice
        self.tools: list[Tool] = [] if choice == "none" else body.tools or []
        self.grammar: Grammar | None = None
        self._form: CallFormat = call_format(tokenizer.chat_template)
        self._parallel = body.parallel_tool_calls is not False
        self._named: str | None = None
        if isinstance(choice, ToolChoice):
            self._named = choice.function.name
        if choice not in (None, "none", "auto"):
            named = choice if isinstance(choice, str) else choice.model_dump()
            try:
                self.grammar = grammar_for_tools([tool.model_dump(exclude_none=True) for tool in self.tools], named)
            except UserError as error:
                raise ApiError(400, str(error), param="tool_choice") from None

    def reader(self) -> ToolReader | None:
        """A reader of one sample's text; None where no call can come."""
        if self.grammar is not None:
            return ForcedCall(self._form, self._named)
        names = [tool.function.name for tool in self.tools]
        return FreeCalls(self._form, names, parallel=self._parallel) if names else None


def chat_prompt(messages: Sequence[ChatMessage], tools: Sequence[Tool], tokenizer: Tokenizer) -> list[int]:
    """Return the ids after which the assistant speaks.

    Raises:
        ApiError: there is nothing to answer.
        UserError: the messages have an order that the model's format does not know.
    """
    if messages[-1].role not in ("user", "tool"):
        message = "the last message must be the user's, or a tool's result: it is the one to answer"
        raise ApiError(400, message, param="messages")
    house = [message.in_house_form() for message in messages]
    functions = [tool.model_dump(exclude_none=True) for tool in tools]
    if functions or any(message["role"] == "tool" or "tool_calls" in message for message in house):
        if tokenizer.takes_tools:
            return tokenizer.render_with_tools(_joined(house, ("system",)), functions)
        house = _as_text(house, functions)
    return tokenizer.render_for_completion({"messages": _joined(house, ("system", "user", "assistant"))})


def _joined(messages: list[dict[str, Any]], roles: Sequence[str]) -> list[dict[str, Any]]:
    """Join neighbours of one of `roles`: models are trained on turns that alternate, OpenAI's need not."""
    joined: list[dict[str, Any]] = []
    for message in messages:
        last = joined[-1] if joined else None
        if last is not None and last["role"] == message["role"] in roles and _is_text(last) and _is_text(message):
            last["content"] += "\n\n" + message["content"]
        else:
            joined.append(dict(message))
    return joined


def _is_text(message: dict[str, Any]) -> bool:
    return isinstance(message["content"], str) and message.keys() == {"role", "content"}


def _as_text(messages: list[dict[str, Any]], functions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write functions, calls and results into the text of system, assistant and user messages."""
    written: list[dict[str, Any]] = []
    if functions:
        lines = "\n".join(json.dumps(function["function"], ensure_ascii=False) for function in functions)
        written.append({"role": "system", "content": _TOLD.format(functions=lines)})
    for message in messages:
        content = message["content"]
        if message["role"] == "tool":
            written.append({"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"})
        elif message["role"] == "assistant" and "tool_calls" in message:
            calls = [
                f'<tool_call>{{"name": {json.dumps(call["function"]["name"])}, '
                f'"arguments": {call["function"]["arguments"]}}}</tool_call>'
                for call in message["tool_calls"]
            ]
            text = content if isinstance(content, str) else "".join(part["text"] for part in content)
            written.append({"role": "assistant", "content": "\n".join([*([text] if text else []), *calls])})
        else:
            written.append(message)
    return written
