"""Text of a token stream, handed out only in whole characters."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanoworks.tokenizer.tokenizer import Tokenizer


class StreamDecoder:
    """Decodes ids as they are sampled; a character split over tokens waits for its last byte.

    What the pushes return, followed by `flush()`, is `decode_bytes` of all the ids as UTF-8 with invalid
    bytes replaced by U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Sequence[int]) -> str:
        """Return the text that became certain with `ids`; maybe empty."""
        return self._utf8.decode(self._tokenizer.decode_bytes(ids))

    def flush(self) -> str:
        """End the stream: return U+FFFD for an unfinished character, else an empty string."""
        return self._utf8.decode(b"", final=True)
