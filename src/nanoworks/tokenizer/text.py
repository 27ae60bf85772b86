"""Makes any Python string safe for the Rust encoders, which panic on two kinds of input."""

from __future__ import annotations

import itertools
import re

# Their regex engine keeps one stack entry a character while it looks for the end of a run of spaces and
# gives up at a million. A power of two, so that a cut rarely falls inside a token of spaces.
_MAX_SPACES = 1 << 19
_LONG_SPACES = re.compile(rf"[^\S\r\n]{{{_MAX_SPACES}}}")


def safe_pieces(text: str) -> list[str]:
    """Cut `text` where a run of half a million spaces would overflow; nearly always `[text]`.

    A lone surrogate, which has no UTF-8 form, becomes U+FFFD. Encoding the pieces one by one gives the ids
    of the whole, but for the few tokens at such a cut; the bytes are always the same.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if len(text) <= _MAX_SPACES:
        return [text]
    cuts = [0, *(match.end() for match in _LONG_SPACES.finditer(text)), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(cuts) if start < end]
