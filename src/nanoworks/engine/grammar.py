"""What an output must be: a description that needs no library. `guidance.py` makes it hold."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from nanoworks.common.errors import UserError

Kind = Literal["json_object", "json_schema", "regex", "lark", "choice"]

MAX_TEXT = 2**16
"""Longest schema, expression or grammar in characters."""


@dataclass(frozen=True)
class Grammar:
    """What an output must be, all of it.

    Attributes:
        kind: json_object (any object), json_schema, regex (Rust's syntax, anchored at both ends, no look-around),
            lark (a context-free grammar, llguidance's dialect of Lark) or choice (one of some strings).
        text: the schema, the expression or the grammar; for choice a JSON list of strings; for json_object "".

    UserError when `text` is too long or is no JSON; what else is wrong with it shows when it is compiled.
    """

    kind: Kind
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UserError(f"the kind of a grammar must be one of {', '.join(get_args(Kind))}, not {self.kind!r}")
        if len(self.text) > MAX_TEXT:
            raise UserError(f"the {self.kind} has {len(self.text)} characters; at most {MAX_TEXT} are allowed")
        if self.kind == "json_schema" and not isinstance(_parse(self.text, self.kind), dict):
            raise UserError('a json_schema must be a JSON object, such as {"type": "object"}')
        if self.kind == "choice":
            choices = _parse(self.text, self.kind)
            if not (isinstance(choices, list) and choices and all(isinstance(c, str) and c for c in choices)):
                raise UserError("a choice needs a JSON list of strings, none of them empty")

    @classmethod
    def json_schema(cls, schema: dict[str, Any]) -> Grammar:
        return cls("json_schema", json.dumps(schema))

    @classmethod
    def choice(cls, choices: Iterable[str]) -> Grammar:
        return cls("choice", json.dumps(list(choices)))

    @property
    def is_json(self) -> bool:
        return self.kind in ("json_object", "json_schema")


def grammar_for_tools(tools: Sequence[dict[str, Any]], tool_choice: str | dict[str, Any]) -> Grammar | None:
    """Return the grammar of the call that OpenAI's `tool_choice` forces, or None when it forces none.

    A named function gives the schema of its arguments, "required" that of `{"name": ..., "arguments": ...}` with any
    of the functions. UserError for a function that `tools` does not have.
    """
    functions = {tool["function"]["name"]: tool["function"] for tool in tools}
    if isinstance(tool_choice, dict):
        name = tool_choice.get("function", {}).get("name")
        if name not in functions:
            raise UserError(f"tool_choice names {name!r}, which is not in tools: {', '.join(functions) or 'none'}")
        return Grammar.json_schema(_arguments(functions[name]))
    if tool_choice != "required":
        return None
    if not functions:
        raise UserError("tool_choice='required' needs at least one function in tools")
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": _arguments(function)},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name, function in functions.items()
    ]
    return Grammar.json_schema(calls[0] if len(calls) == 1 else {"anyOf": calls})


def _arguments(function: dict[str, Any]) -> dict[str, Any]:
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    return function.get("parameters") or nothing


def _parse(text: str, kind: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the {kind} is no JSON, or nested too deeply: {error}") from None
