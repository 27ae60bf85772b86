"""Rendering: nanochat's ids and masks, and a plain message for every conversation that is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nanoworks.common.errors import UserError
from nanoworks.tokenizer import Tokenizer, message_text, validate_conversation

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}
SYSTEM = {"role": "system", "content": "be brief"}


def check(tokenizer: Tokenizer, conversations: dict[str, Any]) -> None:
    for name, case in conversations.items():
        conversation = case["conversation"]
        rendered = tokenizer.render(conversation)
        assert (rendered.ids, rendered.mask) == (case["ids"], case["mask"]), name
        cut = tokenizer.render(conversation, max_tokens=8)
        assert [cut.ids, cut.mask] == case["max_tokens_8"], name
        if "render_for_completion" in case:  # nanochat has none without an answer
            assert tokenizer.render_for_completion(conversation) == case["render_for_completion"], name


def test_golden(tokenizer: Tokenizer, golden: dict[str, Any]) -> None:
    assert {"system", "tool", "injection"} <= golden["conversations"].keys()
    check(tokenizer, golden["conversations"])


@pytest.mark.parametrize("era", ["old", "new"])
def test_full_golden(tokenizer: Tokenizer, shared_dir: Path, era: str) -> None:
    text = (shared_dir / "golden" / "nanochat" / era / "golden.json").read_text()
    check(tokenizer, json.loads(text)["tokenizer"]["conversations"])


def test_parts(tokenizer: Tokenizer) -> None:
    parts = [
        {"type": "text", "text": "Let me see. "},
        {"type": "python", "text": "6*7"},
        {"type": "python_output", "text": "42"},
        {"type": "text", "text": "It is 42."},
    ]
    rendered = tokenizer.render({"messages": [USER, {"role": "assistant", "content": parts}]})
    learned = tokenizer.decode([i for i, m in zip(rendered.ids, rendered.mask, strict=True) if m])
    given = tokenizer.decode([i for i, m in zip(rendered.ids, rendered.mask, strict=True) if not m])
    assert learned == "Let me see. <|python_start|>6*7<|python_end|>It is 42.<|assistant_end|>"
    assert given == "<|bos|><|user_start|>hi<|user_end|><|assistant_start|><|output_start|>42<|output_end|>"
    assert message_text({"role": "assistant", "content": parts}) == "Let me see. 6*742It is 42."


def test_system_opens_the_first_user_message(tokenizer: Tokenizer) -> None:
    merged = {"messages": [{"role": "user", "content": "be brief\n\nhi"}, ASSISTANT, USER]}
    conversation = {"messages": [SYSTEM, USER, ASSISTANT, USER]}
    assert tokenizer.render(conversation) == tokenizer.render(merged)
    assert tokenizer.render_for_completion(conversation) == tokenizer.render_for_completion(merged)
    assert conversation["messages"][1] == USER  # the caller's own is left as it was


def test_completion_continues_as_rendered(tokenizer: Tokenizer) -> None:
    """The prompt of an answer is exactly what training saw before it."""
    conversation = {"messages": [SYSTEM, USER, ASSISTANT]}
    prompt = tokenizer.render_for_completion(conversation)
    assert tokenizer.render(conversation).ids[: len(prompt)] == prompt
    assert tokenizer.render_for_completion({"messages": [SYSTEM, USER]}) == prompt


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (None, "a list of messages"),
        ("hi", "a list of messages"),
        ([], "message 0: missing"),
        ([SYSTEM], "message 1: missing"),
        ([ASSISTANT], "message 0: role is 'assistant' where 'user' is due"),
        ([USER, USER], "message 1: role is 'user' where 'assistant' is due"),
        ([USER, ASSISTANT, SYSTEM], "message 2: role is 'system' where 'user' is due"),
        ([USER, {"role": "tool", "content": ""}], "message 1: role is 'tool'"),
        ([USER, {"role": "assistant"}], 'message 1: needs "role" and "content"'),
        ([USER, "hello"], "message 1: needs"),
        ([{"role": "user", "content": 3}], "message 0: the content of a user message must be a string"),
        ([{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "message 0: the content of a user"),
        ([USER, {"role": "assistant", "content": None}], "message 1: content must be"),
        ([USER, {"role": "assistant", "content": ["a"]}], "message 1: every part needs"),
        ([USER, {"role": "assistant", "content": [{"type": "text"}]}], "message 1: every part needs"),
        (
            [USER, {"role": "assistant", "content": [{"type": "pyton", "text": ""}]}],
            r"message 1: unknown part type 'pyton' \(did you mean 'python'\?\); known: text, python",
        ),
    ],
)
def test_invalid(tokenizer: Tokenizer, messages: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        validate_conversation({"messages": messages})
    with pytest.raises(UserError, match=reason):
        tokenizer.render({"messages": messages})
    with pytest.raises(UserError, match=reason):
        tokenizer.render_for_completion({"messages": messages})
