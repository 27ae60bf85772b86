"""How a conversation of a task becomes a prompt: in the chat format, or as plain text for a base model."""

from __future__ import annotations

from typing import Any

from nanoworks.tasks import Conversation
from nanoworks.tokenizer import Tokenizer

PLAIN_STOP = ("\nQuestion:",)
"""A base model does not end its turn; it goes on with the next question."""

_PLAIN = {"system": "{}\n\n", "user": "Question: {}\n", "assistant": "Answer: {}\n"}
_PARTS = {"text": "{}", "python": "<<{}=", "python_output": "{}>>"}


def text_of(content: Any) -> str:
    """Return the content of a message as text, a tool call in GSM8K's notation `<<expression=result>>`."""
    if isinstance(content, str):
        return content
    return "".join(_PARTS[part["type"]].format(part["text"]) for part in content)


def prompt_ids(tokenizer: Tokenizer, conversation: Conversation, *, chat: bool) -> list[int]:
    """Return the ids after which the answer to the conversation's last question follows."""
    if chat:
        return tokenizer.render_for_completion(conversation)
    messages = conversation["messages"][:-1]
    text = "".join(_PLAIN[message["role"]].format(text_of(message["content"])) for message in messages)
    return tokenizer.encode(text + "Answer:", bos=True)


def letter_ids(tokenizer: Tokenizer, letter: str, *, chat: bool) -> list[int]:
    """Return the ids of a letter as the answer; in plain text a space stands before it."""
    return tokenizer.encode(letter if chat else f" {letter}")
