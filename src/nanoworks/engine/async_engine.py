"""The engine behind a server: one thread runs its steps, coroutines submit requests and read their deltas.

Usage:
    async with contextlib.aclosing(engine.submit(Request(prompt_ids, params))) as deltas:
        async for delta in deltas: ...
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import defaultdict
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from nanoworks.engine.config import EngineConfig
from nanoworks.engine.engine import Engine
from nanoworks.engine.request import Delta, EngineStats, Request
from nanoworks.tokenizer.tokenizer import Tokenizer


@dataclass
class _Reader:
    """Where the deltas of one request go: a queue in the event loop that waits for them."""

    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[Delta | BaseException] = field(default_factory=asyncio.Queue)


class AsyncEngine:
    """Owns `engine` from now on: nothing else may step it. `shutdown` ends the thread."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.error: BaseException | None = None
        """What stopped the step loop, if it failed; every request after that raises it."""
        self._readers: dict[str, _Reader] = {}
        self._incoming: list[Request] = []
        self._abandoned: list[str] = []
        self._closing = False
        self._wake = threading.Condition()  # guards the four fields above
        self._thread = threading.Thread(target=self._loop, name="nanoworks-engine", daemon=True)
        self._thread.start()

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.engine.tokenizer

    @property
    def config(self) -> EngineConfig:
        return self.engine.config

    @property
    def max_context(self) -> int:
        return self.engine.max_context

    def submit(self, request: Request) -> AsyncGenerator[Delta, None]:
        """Return an asynchronous iterator over the deltas of `request`; closing it cancels the request.

        A request that can never run raises UserError here, one too many QueueFull, before
        anything is sent.
        """
        self.engine.check(request)
        self.check_queue()
        return self._read(request)

    def check_queue(self) -> None:
        """Raise QueueFull when the next request would be refused."""
        self.engine.check_queue(arriving=len(self._incoming))

    def stats(self) -> EngineStats:
        return self.engine.stats()

    def shutdown(self) -> None:
        """End all requests with the reason "cancelled" and wait for the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    async def _read(self, request: Request) -> AsyncGenerator[Delta, None]:
        reader = _Reader(asyncio.get_running_loop())
        with self._wake:
            if self._closing:
                raise RuntimeError("the engine has stopped") from self.error
            self._readers[request.request_id] = reader
            self._incoming.append(request)
            self._wake.notify()
        unfinished = request.num_sequences
        try:
            while unfinished:
                item = await reader.queue.get()
                if isinstance(item, BaseException):
                    raise RuntimeError("the engine failed") from item
                unfinished -= item.finish_reason is not None
                yield item
        finally:
            with self._wake:
                self._readers.pop(request.request_id, None)
                if unfinished:
                    self._abandoned.append(request.request_id)
                    self._wake.notify()

    # ------------------------------------------------------------------------------- in the engine's thread

    def _loop(self) -> None:
        try:
            while not self._closing:
                self._take_orders()
                self._deliver(self.engine.step())
            self._take_orders()  # what came in meanwhile ends like the rest
            for request_id in list(self._readers):
                self.engine.cancel(request_id)
            self._deliver(self.engine.step())
        except BaseException as error:
            with self._wake:
                self.error, self._closing = error, True
                readers = list(self._readers.values())
            for reader in readers:
                _call(reader.loop, [(reader, error)])

    def _take_orders(self) -> None:
        """Hand new and abandoned requests to the engine; sleep while there is nothing to do."""
        with self._wake:
            while not (self._incoming or self._abandoned or self._closing or self.engine.has_work):
                self._wake.wait()
            incoming, self._incoming = self._incoming, []
            abandoned, self._abandoned = self._abandoned, []
        for request in incoming:
            self.engine.add(request)
        for request_id in abandoned:
            self.engine.cancel(request_id)

    def _deliver(self, deltas: list[Delta]) -> None:
        """Wake each event loop once a step, however many deltas are for it."""
        mail: dict[asyncio.AbstractEventLoop, list[tuple[_Reader, Delta | BaseException]]] = defaultdict(list)
        with self._wake:
            for delta in deltas:
                reader = self._readers.get(delta.request_id)
                if reader is not None:
                    mail[reader.loop].append((reader, delta))
        for loop, items in mail.items():
            _call(loop, items)


def _call(loop: asyncio.AbstractEventLoop, items: list[tuple[_Reader, Delta | BaseException]]) -> None:
    def put() -> None:
        for reader, item in items:
            reader.queue.put_nowait(item)

    with contextlib.suppress(RuntimeError):  # the event loop was closed under its readers: nobody listens
        loop.call_soon_threadsafe(put)
