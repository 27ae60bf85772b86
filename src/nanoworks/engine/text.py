"""The text of one output as it streams: whole characters only, cut before the first stop string."""

from __future__ import annotations

from collections.abc import Sequence

from nanoworks.tokenizer.stream import StreamDecoder
from nanoworks.tokenizer.tokenizer import Tokenizer


class TextStream:
    """Decodes pushed tokens and holds back text that may be the beginning of a stop string.

    What `push` and the final `flush` return, joined, is the text of the output.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False
        """Whether a stop string has occurred; nothing is returned from then on."""

    def push(self, ids: Sequence[int], *, may_stop: bool = True) -> str:
        """Return the text that became certain with `ids`; maybe empty. A stop string that `ids` complete counts only
        with `may_stop`."""
        return self._release(self._decoder.push(ids), may_stop)

    def flush(self) -> str:
        """Return what was held back: no more tokens come."""
        text = self._release(self._decoder.flush()) + self._held
        self._held = ""
        return text

    def _release(self, new: str, may_stop: bool = True) -> str:
        if self.stopped or not self._stop:
            return "" if self.stopped else new
        text = self._held + new
        # What was held back holds no stop string that counts: one that does ends in the new text.
        held = len(self._held)
        found = [at for stop in self._stop if (at := text.find(stop, max(0, held - len(stop) + 1))) >= 0]
        if found and may_stop:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` that `text` ends with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
