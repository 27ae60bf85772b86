"""The one exception a user is meant to read: it says what is wrong and what to do about it.

The command line prints it without a traceback and exits with status 2; everything else that is raised
is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input or a bad environment. The message names the fix."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the closest of `known`, or an empty string."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""


def missing_extra(package: str, extra: str) -> UserError:
    """Return the error for an optional dependency that is not installed."""
    return UserError(f"{package} is not installed; install it with: pip install 'nanoworks[{extra}]'")
