"""A conversation with a model in this process: history, and answers as a stream of pieces."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from typing import Any

from nanoworks.engine import Engine, SamplingParams
from nanoworks.serve.parts import PartSplitter, Piece, add_piece


class ChatSession:
    """Holds the messages in nanochat's form and asks the engine for the next one.

    An answer that is stopped keeps what was said; one that ends before its first word takes the user's turn
    with it, so that turns always alternate.
    """

    def __init__(self, engine: Engine, params: SamplingParams, *, system: str = "") -> None:
        assert engine.tokenizer is not None, "a chat needs a tokenizer"
        self.system = system
        self.messages: list[dict[str, Any]] = []
        self.finish_reason: str | None = None
        """Why the last answer ended; None when it was stopped."""
        self._engine = engine
        self._tokenizer = engine.tokenizer
        self._params = params
        self._answers = 0

    def conversation(self) -> dict[str, Any]:
        head = [{"role": "system", "content": self.system}] if self.system else []
        return {"messages": head + self.messages}

    @property
    def last_user_text(self) -> str | None:
        """The user's last turn, or None at the start."""
        return self.messages[-2]["content"] if self.messages else None

    def ask(self, text: str) -> Generator[Piece, None, None]:
        """Add the user's turn and stream the answer; closing the iterator stops it.

        Raises:
            UserError: the conversation no longer fits the model's context; it is left as it was.
        """
        self.messages.append({"role": "user", "content": text})
        parts: list[Piece] = []
        try:
            with closing(self._pieces()) as pieces:
                for piece in pieces:
                    add_piece(parts, piece)
                    yield piece
        finally:
            if parts:
                only_text = len(parts) == 1 and parts[0]["type"] == "text"
                content = parts[0]["text"] if only_text else parts
                self.messages.append({"role": "assistant", "content": content})
            else:
                self.messages.pop()

    def drop_last_exchange(self) -> None:
        del self.messages[-2:]

    def clear(self) -> None:
        self.messages.clear()

    def _prompt(self) -> list[int]:
        return self._tokenizer.render_for_completion(self.conversation())

    def _pieces(self) -> Generator[Piece, None, None]:
        params = self._params
        if params.seed is not None:
            # Another answer to the same question must be able to differ, and a script must repeat.
            params = replace(params, seed=params.seed + self._answers)
        self._answers += 1
        self.finish_reason = None
        splitter = PartSplitter()
        with closing(self._engine.stream(self._prompt(), params)) as deltas:
            for delta in deltas:
                yield from splitter.feed(delta.text)
                self.finish_reason = delta.finish_reason
        yield from splitter.finish()


class TextSession(ChatSession):
    """For a base model: each turn of the user is a text to continue, without roles and without memory."""

    def _prompt(self) -> list[int]:
        return self._tokenizer.encode(self.messages[-1]["content"], bos=True)
