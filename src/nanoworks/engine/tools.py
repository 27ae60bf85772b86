"""The calculator tool: a safe evaluator, and the per-request state machine that feeds its results back.

When the model writes `<|python_start|>12*7<|python_end|>`, the engine forces
`<|output_start|>84<|output_end|>` into the output and generation goes on from there; an expression the
calculator refuses forces nothing.

The evaluator knows numbers, + - * / // %, parentheses and `"text".count("t")`. It needs no clock and no
signal, so it works in any thread: the expression is short, there is no power and no loop, and so the cost and
the size of every result are bounded by the length of the expression.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

MAX_EXPRESSION = 256
"""Longest expression in characters. Integers then stay below 10**256, which a float still holds."""

_STRING = r"'[^'\\\n]*'|\"[^\"\\\n]*\""
_STRING_OR_THOUSANDS = re.compile(rf"({_STRING})|(?<=\d),(?=\d)")
_OUTSIDE_STRINGS = re.compile(rf"(?:{_STRING}|\.count\(|[0-9.+\-*/%() ])*")

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def calculate(expression: str) -> int | float | None:
    """Return the value of `expression`, or None when it is malformed, not allowed, or has no value (1/0).

    A comma between digits is a thousands separator: `1,234*2` is 2468.
    """
    if len(expression) > MAX_EXPRESSION:
        return None
    expression = _STRING_OR_THOUSANDS.sub(lambda match: match.group(1) or "", expression).strip()
    # The alphabet check comes first: what passes it makes the parser neither warn nor build a surprise.
    if not _OUTSIDE_STRINGS.fullmatch(expression):
        return None
    try:
        return _evaluate(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _evaluate(node: ast.expr) -> int | float:
    match node:
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_evaluate(left), _evaluate(right))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_evaluate(operand))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str() as text), attr="count"),
            args=[ast.Constant(value=str() as part)],
            keywords=[],
        ):
            return text.count(part)
    raise ValueError("not allowed in an expression")


class ToolTokenizer(Protocol):
    """What the tool needs of a tokenizer."""

    special_tokens: dict[str, int]

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class Calculator:
    """State machine over the output tokens of one sequence."""

    MARKS = ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")

    def __init__(self, tokenizer: ToolTokenizer) -> None:
        self._tokenizer = tokenizer
        self._start, self._end, self._output_start, self._output_end = (
            tokenizer.special_tokens[mark] for mark in self.MARKS
        )
        self._expression: list[int] | None = None  # tokens since python_start; None outside a call

    @classmethod
    def supported_by(cls, tokenizer: ToolTokenizer) -> bool:
        return all(mark in tokenizer.special_tokens for mark in cls.MARKS)

    def observe(self, token: int) -> list[int]:
        """Take the next sampled token; return the tokens that are forced after it, mostly none."""
        if token == self._start:
            self._expression = []
        elif token == self._end and self._expression is not None:
            result = calculate(self._tokenizer.decode(self._expression))
            self._expression = None
            if result is not None:
                return [self._output_start, *self._tokenizer.encode(str(result)), self._output_end]
        elif self._expression is not None:
            self._expression.append(token)
        return []
