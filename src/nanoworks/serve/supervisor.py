"""Keeps an engine running in a process of its own: one that ends, or does nothing, is replaced by another."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from nanoworks.common.errors import UserError
from nanoworks.engine.client import EngineGone
from nanoworks.engine.config import EngineConfig
from nanoworks.engine.remote import EngineSpec, RemoteEngine
from nanoworks.engine.request import Delta, EngineStats, Request
from nanoworks.tokenizer import Tokenizer

log = logging.getLogger("nanoworks")

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before another process is started: twice as many after each one that did not last."""
LASTED = 60.0
"""Seconds after which a process is taken to have worked, and its end for a new trouble."""


class Supervisor:
    """An `EngineClient` over one `RemoteEngine` after another.

    Args:
        spec: what each of them runs.
        hang_seconds: requests that wait so long without any sign of the process end it.

    Attributes:
        restarts: processes started after the first.
    """

    tokenizer: Tokenizer
    max_context: int
    config: EngineConfig
    lineage: Mapping[str, Any]

    def __init__(self, spec: EngineSpec, *, hang_seconds: float = 60) -> None:
        self.spec, self._hang_seconds = spec, hang_seconds
        self._engine = RemoteEngine(spec)
        self._up = False
        self._closing = False
        self._task: asyncio.Task[None] | None = None
        self.restarts = 0

    def wait(self) -> None:
        """Block until the first engine is ready; raises what `RemoteEngine.wait` does."""
        self._engine.wait()
        self.tokenizer, self.max_context = self._engine.tokenizer, self._engine.max_context
        self.config, self.lineage = self._engine.config, self._engine.lineage
        self._up = True

    def start(self) -> None:
        """Watch the engine from now on, in the running event loop."""
        self._task = asyncio.create_task(self._keep())

    @property
    def pid(self) -> int:
        """Of the engine's process."""
        return self._engine.pid

    @property
    def error(self) -> EngineGone | None:
        if self._up:
            return self._engine.error
        return EngineGone("the server is stopping" if self._closing else "the engine is being started again")

    def submit(self, request: Request) -> AsyncGenerator[Delta, None]:
        self._check_up()
        return self._engine.submit(request)

    def check_queue(self) -> None:
        self._check_up()
        self._engine.check_queue()

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def shutdown(self) -> None:
        self._closing = True
        if self._task is not None and self._task.get_loop().is_running():
            self._task.get_loop().call_soon_threadsafe(self._task.cancel)
        self._engine.shutdown()
        self._up = False

    def _check_up(self) -> None:
        error = self.error
        if error is not None:
            raise error

    async def _keep(self) -> None:
        pause = FIRST_PAUSE
        while True:
            started = time.monotonic()
            if self._up:
                await self._engine.connect()
                await self._watch(self._engine)
                self._up = False
                log.error("the engine's process ended %s; starting another", await self._engine.ended())
            if time.monotonic() - started > LASTED:
                pause = FIRST_PAUSE
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            await self._restart()

    async def _watch(self, engine: RemoteEngine) -> None:
        """Return when the process is gone; end it when it hangs."""
        while not engine.gone.is_set():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(engine.gone.wait(), min(1.0, self._hang_seconds / 4))
            if engine.silent_seconds > self._hang_seconds:
                log.error("the engine has done nothing for %.0f s although it has work", engine.silent_seconds)
                engine.kill()

    async def _restart(self) -> None:
        self._engine = RemoteEngine(self.spec)
        self.restarts += 1
        try:
            await asyncio.to_thread(self._engine.wait)
        except (UserError, EngineGone) as error:
            log.error("the engine could not be started again: %s", error)
        except asyncio.CancelledError:
            self._engine.kill()  # the server stops, and may have looked for a process just before this one began
            raise
        else:
            self._up = True
            log.warning("the engine runs again, as process %d", self._engine.pid)
