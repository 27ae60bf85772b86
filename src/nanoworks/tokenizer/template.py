"""Chat rendering by a Jinja template, for vocabularies whose format is not nanochat's.

The template and the names it sees follow the convention of Hugging Face's `chat_template.jinja`. It comes
with a model from elsewhere, so it runs in Jinja's immutable sandbox.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from jinja2 import TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nanoworks.common.errors import UserError
from nanoworks.tokenizer.backends import HuggingFaceBackend
from nanoworks.tokenizer.conversation import (
    Conversation,
    Rendered,
    message_text,
    validate_conversation,
)

# Put inside a special token that a message spells out, so that it is not taken for the token itself. A
# noncharacter: Unicode reserves it for such internal use.
_CUT = "\ufdd0"


class TemplateFormat:
    """Renders conversations through `source`; `names` are the template's variables (bos_token, ...)."""

    def __init__(self, backend: HuggingFaceBackend, source: str, names: Mapping[str, str]) -> None:
        self._backend, self._names = backend, names
        self.source = source
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            self.takes_tools = "tools" in meta.find_undeclared_variables(environment.parse(source))
        except TemplateError as error:
            raise UserError(f"the chat template does not parse: {error}") from None

    def render(self, conversation: Conversation) -> Rendered:
        """Return ids and mask; learned is what each assistant message adds after its generation prompt.

        Raises:
            UserError: an invalid conversation, tool parts (a template has no place for them), or a template
                that rewrites earlier turns, so that no stretch of the text is the assistant's.
        """
        messages = self._messages(conversation)
        text = self._text(messages)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._text(messages[:i], add_generation_prompt=True)
                after = self._text(messages[: i + 1])
                if not (text.startswith(after) and after.startswith(before)):
                    raise UserError(
                        f"message {i}: the chat template changes earlier text when a message is added, "
                        "so the learned tokens cannot be told; train on one answer a conversation"
                    )
                spans.append(range(len(before), len(after)))
        ids, starts = self._encode(text)
        return Rendered(ids, [int(any(start in span for span in spans)) for start in starts])

    def prompt(self, conversation: Conversation) -> list[int]:
        """Return the ids after which the assistant speaks; the last message is a user's."""
        return self._encode(self._text(self._messages(conversation), add_generation_prompt=True))[0]

    def prompt_with_tools(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the ids after which the assistant speaks, or calls one of `tools`; both in OpenAI's form, but that the
        arguments of calls are objects. Only the template says which order of messages is right."""
        text = self._text(self._cut(list(messages)), add_generation_prompt=True, tools=self._cut(list(tools)) or None)
        return self._encode(text)[0]

    def _cut(self, value: Any) -> Any:
        """Return `value` with `_CUT` in every special token that its strings spell out."""
        if isinstance(value, str):
            for token in self._backend.special_tokens:
                value = value.replace(token, token[0] + _CUT + token[1:])
            return value
        if isinstance(value, Mapping):
            return {self._cut(key): self._cut(item) for key, item in value.items()}
        return [self._cut(item) for item in value] if isinstance(value, list) else value

    def _messages(self, conversation: Conversation) -> list[dict[str, str]]:
        """The messages as text only, with `_CUT` in every special token they spell out."""
        validate_conversation(conversation)
        messages = []
        for i, message in enumerate(conversation["messages"]):
            parts = [] if isinstance(message["content"], str) else message["content"]
            if any(part["type"] != "text" for part in parts):
                raise UserError(f"message {i}: this tokenizer's chat template has no form for tool calls")
            messages.append({"role": message["role"], "content": self._cut(message_text(message))})
        return messages

    def _encode(self, text: str) -> tuple[list[int], list[int]]:
        """The ids of a rendered conversation and where in `text` each begins."""
        ids: list[int] = []
        starts: list[int] = []
        offset = 0
        for piece in text.split(_CUT):
            piece_ids, piece_starts = self._backend.encode_markup(piece)
            ids += piece_ids
            starts += [offset + start for start in piece_starts]
            offset += len(piece) + len(_CUT)
        return ids, starts

    def _text(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False, **variables: Any
    ) -> str:
        variables = {**self._names, **variables, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(messages=messages, **variables)
        except TemplateError as error:
            raise UserError(f"the chat template refused this conversation: {error}") from None


class _Generation(Extension):
    """Accepts `{% generation %}`, transformers' marker of assistant text; we find it by prefixes instead."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's interface)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _to_json(value: Any, indent: int | None = None) -> str:
    """Plain JSON; Jinja's own filter would escape it for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
