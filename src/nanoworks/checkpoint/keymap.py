"""Translates parameter names between our models and a foreign layout, both ways, from declarative rules.

A rule is a pair of patterns with at most one `*` each, e.g. `layers.*.self_attn.q_proj.weight` and
`transformer.h.*.attn.c_q.weight`; a trailing `*` stands for any rest of the name. The first rule that
matches decides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping


class KeyMap:
    def __init__(self, rules: Mapping[str, str]) -> None:
        """`rules` maps our patterns to theirs."""
        self._ours = [(_compile(ours), theirs) for ours, theirs in rules.items()]
        self._theirs = [(_compile(theirs), ours) for ours, theirs in rules.items()]

    def to_foreign(self, name: str) -> str | None:
        """Their name for our `name`, or None when no rule speaks of it."""
        return _translate(name, self._ours)

    def to_ours(self, name: str) -> str | None:
        """Our name for their `name`, or None when no rule speaks of it."""
        return _translate(name, self._theirs)


def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", "(.+)"))


def _translate(name: str, rules: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, target in rules:
        if match := pattern.fullmatch(name):
            return target.replace("*", match.group(1), 1) if match.groups() else target
    return None
