"""Translates parameter names between our models and a foreign layout, both ways, from declarative rules.

A rule is a pair of patterns, e.g. `layers.*.self_attn.q_proj.weight` and `transformer.h.*.attn.c_q.weight`: `*`, at
most one each, stands for any text. A `#` in their pattern is the number of an expert: theirs are separate tensors,
ours is one that stacks them as dimension 0. The first rule that matches decides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple


class Place(NamedTuple):
    """Where a foreign tensor goes: the name of ours, and the expert in it, if ours is a stack."""

    name: str
    expert: int | None


class KeyMap:
    def __init__(self, rules: Mapping[str, str]) -> None:
        """`rules` maps our patterns to theirs."""
        self._ours = [(_compile(ours), theirs) for ours, theirs in rules.items()]
        self._theirs = [(_compile(theirs), ours) for ours, theirs in rules.items()]

    def stacks(self, name: str) -> bool:
        """Whether our `name` stacks tensors that are separate in the foreign layout."""
        foreign = self._foreign(name)
        return foreign is not None and "#" in foreign

    def to_foreign(self, name: str, expert: int | None = None) -> str | None:
        """Their name for our `name` (for one expert of it, if it is a stack), or None when no rule speaks of it."""
        foreign = self._foreign(name)
        return foreign if foreign is None or expert is None else foreign.replace("#", str(expert))

    def to_ours(self, name: str) -> Place | None:
        """The place of their `name` in our model, or None when no rule speaks of it."""
        for pattern, ours in self._theirs:
            if match := pattern.fullmatch(name):
                found = match.groupdict()
                expert = found.get("expert")
                return Place(ours.replace("*", found.get("any", ""), 1), None if expert is None else int(expert))
        return None

    def _foreign(self, name: str) -> str | None:
        for pattern, theirs in self._ours:
            if match := pattern.fullmatch(name):
                return theirs.replace("*", match.groupdict().get("any", ""), 1)
        return None


def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", "(?P<any>.+)").replace(r"\#", r"(?P<expert>\d+)"))
