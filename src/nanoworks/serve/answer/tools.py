"""Functions of the client: how a model is told of them, and how its calls are read.

A chat template that takes tools decides both. Others get a system text that asks for `<tool_call>` with JSON inside,
the form that most open models were trained on, and calls and results of the conversation as text of that form. A call
that `tool_choice` forces comes through a grammar instead, and is read from the bare JSON.

A call that is no JSON, or of a function that there is not, stays text: nothing of an answer is lost.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Fields = dict[str, Any]
"""A `delta` of a chunk."""


@dataclass(frozen=True)
class CallFormat:
    """How a model writes calls: JSON between `opening` and `closing`, "" for the answer's end; `bare`: or without
    `opening`, where the answer begins with a brace."""

    opening: str = "<tool_call>"
    closing: str = "</tool_call>"
    bare: bool = False
    id_length: int = 24


HERMES = CallFormat()
MISTRAL = CallFormat("[TOOL_CALLS]", "", id_length=9)  # its template refuses ids of any other length
LLAMA = CallFormat("<|python_tag|>", "", bare=True)


def call_format(template: str | None) -> CallFormat:
    """Return what the calls of a model with this chat template look like; None: it has no template."""
    if template and MISTRAL.opening in template:
        return MISTRAL
    if template and HERMES.opening not in template and '"parameters"' in template:
        return LLAMA
    return HERMES


class ToolReader(Protocol):
    """Finds calls in a text that comes bit by bit."""

    def feed(self, text: str) -> list[Fields]:
        """Return what `text` completes: `{"content": ...}` or `{"tool_calls": [...]}`."""

    def finish(self) -> list[Fields]:
        """Return what was held back: no more text comes."""

    def reason(self, reason: str) -> str:
        """Return the choice's finish_reason, given the engine's."""


class FreeCalls:
    """The calls of a model that may call or not.

    Args:
        names: of the functions that there are.
        parallel: whether more than one call may be passed on; else it is the first.
    """

    def __init__(self, form: CallFormat, names: Sequence[str], *, parallel: bool = True) -> None:
        self._form, self._names, self._parallel = form, set(names), parallel
        self._held = ""
        self._opening: str | None = None  # of the call that `_held` is the body of
        self._begun = False  # whether anything but space has come
        self._calls = 0

    def feed(self, text: str) -> list[Fields]:
        self._held += text
        found: list[Fields] = []
        while self._step(found):
            pass
        return found

    def finish(self) -> list[Fields]:
        if self._opening is not None:
            if not self._form.closing and (calls := self._read(self._held)) is not None:
                return calls
            self._held = self._opening + self._held
        if self._calls and not self._held.strip():
            return []
        return [{"content": self._held}] if self._held else []

    def reason(self, reason: str) -> str:
        return "tool_calls" if self._calls and reason == "stop" else reason

    def _step(self, found: list[Fields]) -> bool:
        """Take one stretch of what is held; return False when more text is needed."""
        form, held = self._form, self._held
        if self._opening is not None:
            at = held.find(form.closing) if form.closing else -1
            if at < 0:
                return False
            calls = self._read(held[:at])
            found += [{"content": self._opening + held[:at] + form.closing}] if calls is None else calls
            self._opening, self._held = None, held[at + len(form.closing) :]
            return True
        if form.bare and not self._begun and held.lstrip().startswith("{"):
            self._opening = ""
            return True
        at = held.find(form.opening)
        end = at if at >= 0 else len(held) - _overlap(held, form.opening)
        # Space before a call belongs to it: only if it turns out to be none is it text.
        text = held[:end].rstrip()
        self._begun |= bool(text)
        if text:
            found.append({"content": text})
        if at < 0:
            self._held = held[len(text) :]
            return False
        self._opening, self._held = held[len(text) : at] + form.opening, held[at + len(form.opening) :]
        return True

    def _read(self, body: str) -> list[Fields] | None:
        """Return the calls in `body`, None when it is not made of calls."""
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            return None
        calls: list[Fields] = []
        for call in value if isinstance(value, list) else [value]:
            name = call.get("name") if isinstance(call, dict) else None
            if not (isinstance(name, str) and name in self._names):
                return None
            arguments = call.get("arguments", call.get("parameters", {}))
            text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            calls.append(_call(self._calls + len(calls), name, text, self._form))
        if not self._parallel:
            calls = calls[: 1 - self._calls]
        self._calls += len(calls)
        return calls


class ForcedCall:
    """A call that a grammar forces: the text is the JSON of the arguments if `name` is known, else of
    `{"name": ..., "arguments": ...}`, written as `json.dumps` does."""

    _HEAD = re.compile(r'\{"name": ("(?:[^"\\]|\\.)*"), "arguments": ')

    def __init__(self, form: CallFormat, name: str | None) -> None:
        self._form, self._named = form, name is not None
        self._name = name
        self._open = False
        self._held = ""

    def feed(self, text: str) -> list[Fields]:
        self._held += text
        if self._name is None:
            head = self._HEAD.match(self._held)
            if head is None:
                return []
            self._name, self._held = json.loads(head[1]), self._held[head.end() :]
        found: list[Fields] = []
        if not self._open:
            self._open = True
            found.append(_call(0, self._name, "", self._form))
        keep = 0 if self._named else 1  # what may be the brace that closes the whole
        ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        if ready:
            found.append({"tool_calls": [{"index": 0, "function": {"arguments": ready}}]})
        return found

    def finish(self) -> list[Fields]:
        return []  # all that can be held is the last brace, or a head that was cut

    def reason(self, reason: str) -> str:
        # As at OpenAI: who named the function is not told that one was called.
        return "tool_calls" if self._open and reason == "stop" and not self._named else reason


def _call(index: int, name: str, arguments: str, form: CallFormat) -> Fields:
    call_id = uuid.uuid4().hex[: form.id_length]
    function = {"name": name, "arguments": arguments}
    return {
        "tool_calls": [
            {
                "index": index,
                "id": call_id if form is MISTRAL else f"call_{call_id}",
                "type": "function",
                "function": function,
            }
        ]
    }


def _overlap(text: str, mark: str) -> int:
    """Length of the longest proper beginning of `mark` that `text` ends with."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
