"""Whether the engine really answers: one token is asked of it, unless it was seen at work a moment ago."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from nanoworks.engine.request import QueueFull, Request, SamplingParams

if TYPE_CHECKING:
    from nanoworks.engine.client import EngineClient

FRESH_SECONDS = 3.0
"""For so long a good sign is believed, so that probes cost next to nothing."""
_FIRST = 2**31
"""The canary's priority: no queue of users' requests comes before it."""
_ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)


class Canary:
    """Args:
    engine: what is probed, past everything that counts users' requests.
    patience: seconds without a computed token after which it is not ready.
    """

    def __init__(self, engine: EngineClient, *, patience: float) -> None:
        self._engine, self._patience = engine, patience
        self._good = -FRESH_SECONDS
        self._task: asyncio.Task[str] | None = None
        self._failure = ""

    async def failure(self) -> str:
        """Return why the engine is not ready; empty when it is. Waits for a sign, at most `patience` seconds."""
        if self._engine.error is not None:
            self._good = -FRESH_SECONDS
            return str(self._engine.error)
        if time.monotonic() - self._good < FRESH_SECONDS:
            return ""
        if self._task is None or self._task.done():  # all probes of one moment share one
            self._task = asyncio.create_task(self._ask())
        task, before = self._task, self._engine.stats().tokens_computed
        until = time.monotonic() + self._patience
        while time.monotonic() < until:
            await asyncio.wait([task], timeout=0.05)
            if task.done():
                self._failure = task.result()
                break
            if self._failure == "" and self._engine.stats().tokens_computed > before:
                break  # it is busy with other requests, whose tokens are as good a sign
        else:
            return f"the engine has computed nothing for {self._patience:g} s"
        if not self._failure:
            self._good = time.monotonic()
        return self._failure

    async def _ask(self) -> str:
        """Return what is wrong with the answer; empty: nothing."""
        before = self._engine.stats().tokens_computed
        try:
            async for delta in self._engine.submit(Request([0], _ONE_TOKEN, priority=_FIRST, client="canary")):
                if delta.finish_reason == "error":
                    return delta.error or "the model failed"
            return ""
        except QueueFull:
            await asyncio.sleep(1)
            moved = self._engine.stats().tokens_computed > before
            return "" if moved else "the queue is full, and nothing was computed for a second"
        except Exception as error:
            return f"the engine failed: {error}"
