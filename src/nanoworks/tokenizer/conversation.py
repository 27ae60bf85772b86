"""nanochat's conversation format: what a conversation may be, its token ids, and which of them are learned.

A conversation is `{"messages": [{"role": ..., "content": ...}, ...]}`: an optional system message, then
user and assistant in turn. Content is a string; an assistant's may also be a list of parts
`{"type": "text" | "python" | "python_output", "text": str}`, the last two being a tool call and its result.

    <|bos|><|user_start|>system, blank line, user<|user_end|>
    <|assistant_start|>text<|python_start|>call<|python_end|><|output_start|>result<|output_end|>text<|assistant_end|>

Learned (mask 1) is what the assistant has to produce itself: its text, its calls, the end of its turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanoworks.common.errors import UserError, nearest

Conversation = Mapping[str, Any]

PART_TYPES = ("text", "python", "python_output")


@dataclass(frozen=True)
class Rendered:
    """A conversation as tokens: `ids` and, of the same length, `mask` (1 = supervised, 0 = given)."""

    ids: list[int]
    mask: list[int]


def message_text(message: Mapping[str, Any]) -> str:
    """Return a message's content as one string, its parts joined."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def validate_conversation(conversation: Conversation) -> None:
    """Check the form described above.

    Raises:
        UserError: what is wrong, with the index of the message.
    """
    messages = conversation.get("messages") if isinstance(conversation, Mapping) else None
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise UserError('a conversation is {"messages": [...]}, a list of messages under that key')
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise UserError(f'message {i}: needs "role" and "content"')
    first = 1 if messages and messages[0]["role"] == "system" else 0
    if len(messages) == first:
        raise UserError(f"message {first}: missing; a conversation needs a user message")
    for i, message in enumerate(messages):
        role = "system" if i < first else ("user", "assistant")[(i - first) % 2]
        if message["role"] != role:
            raise UserError(
                f"message {i}: role is {message['role']!r} where {role!r} is due "
                "(an optional system message, then user and assistant in turn)"
            )
        _validate_content(i, role, message["content"])


def _validate_content(i: int, role: str, content: Any) -> None:
    if isinstance(content, str):
        return
    if role != "assistant":
        raise UserError(f"message {i}: the content of a {role} message must be a string")
    if not isinstance(content, Sequence):
        raise UserError(f"message {i}: content must be a string or a list of parts")
    for part in content:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            raise UserError(f'message {i}: every part needs "type" and a string "text"')
        if part.get("type") not in PART_TYPES:
            known = ", ".join(PART_TYPES)
            hint = nearest(str(part.get("type")), PART_TYPES)
            raise UserError(f"message {i}: unknown part type {part.get('type')!r}{hint}; known: {known}")


class NanochatFormat:
    """Renders conversations for a vocabulary that has nanochat's special tokens."""

    def __init__(self, encode: Callable[[str], list[int]], special_tokens: Mapping[str, int]) -> None:
        self._encode = encode
        self._special = special_tokens

    def render(self, conversation: Conversation) -> Rendered:
        """Return ids and mask; UserError as `validate_conversation`."""
        validate_conversation(conversation)
        ids: list[int] = []
        mask: list[int] = []

        def add(text: str, supervised: int, opening: str = "", closing: str = "") -> None:
            start = [self._special[opening]] if opening else []
            end = [self._special[closing]] if closing else []
            new = [*start, *self._encode(text), *end]
            ids.extend(new)
            mask.extend([supervised] * len(new))

        add("", 0, opening="<|bos|>")
        for message in _merge_system(conversation["messages"]):
            content = message["content"]
            if message["role"] == "user":
                add(content, 0, "<|user_start|>", "<|user_end|>")
                continue
            add("", 0, opening="<|assistant_start|>")
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                if part["type"] == "text":
                    add(part["text"], 1)
                elif part["type"] == "python":
                    add(part["text"], 1, "<|python_start|>", "<|python_end|>")
                else:
                    add(part["text"], 0, "<|output_start|>", "<|output_end|>")
            add("", 1, closing="<|assistant_end|>")
        return Rendered(ids, mask)

    def prompt(self, conversation: Conversation) -> list[int]:
        """Return the ids after which the assistant speaks; the last message is a user's."""
        return [*self.render(conversation).ids, self._special["<|assistant_start|>"]]


def _merge_system(messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """nanochat has no system tokens: the system message opens the first user message."""
    if messages[0]["role"] != "system":
        return messages
    system, user, *rest = messages
    return [{"role": "user", "content": system["content"] + "\n\n" + user["content"]}, *rest]
