"""What a server sees of an engine, whether that runs in a thread (`AsyncEngine`) or in a process (`RemoteEngine`)."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from nanoworks.engine.config import EngineConfig
from nanoworks.engine.request import Delta, EngineStats, Request
from nanoworks.tokenizer.tokenizer import Tokenizer


class EngineGone(RuntimeError):
    """The engine's process has ended, and every request that was in it. A supervisor may be starting another."""


class EngineClient(Protocol):
    """Used from one event loop; `shutdown` from any thread."""

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    @property
    def config(self) -> EngineConfig: ...

    @property
    def max_context(self) -> int:
        """Most tokens, prompt and output together, that a sequence may have."""

    @property
    def error(self) -> BaseException | None:
        """Why there is no engine at the moment; None while there is one."""

    def submit(self, request: Request) -> AsyncGenerator[Delta, None]:
        """Return an asynchronous iterator over the deltas of `request`; closing it cancels the request.

        Raises:
            QueueFull: here, before anything is sent.
            UserError: the request can never run; here or from the first `anext`.
            RuntimeError: from `anext`; the engine failed, or its process is gone (`EngineGone`).
        """

    def check_queue(self) -> None:
        """Raise QueueFull when the next request would be refused."""

    def stats(self) -> EngineStats: ...

    def shutdown(self) -> None:
        """End all requests with the reason "cancelled", and the engine."""
