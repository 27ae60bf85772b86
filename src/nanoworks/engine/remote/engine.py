"""The server's side of an engine in another process.

Usage:
    engine = RemoteEngine(EngineSpec("runs/sft"))    # starts the process, which loads the model
    engine.wait()                                    # until it is ready
    async for delta in engine.submit(...): ...       # as with AsyncEngine, in one event loop

One process, one life: when it ends, `error` says so and everything under way raises EngineGone. Starting another is
a supervisor's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, cast

from nanoworks.common.errors import UserError
from nanoworks.engine.client import EngineGone
from nanoworks.engine.config import EngineConfig
from nanoworks.engine.remote.spec import EngineSpec
from nanoworks.engine.remote.wire import NO_STATS, Frames, delta_of, frame, unpack_report, unpack_stats
from nanoworks.engine.request import Delta, EngineStats, QueueFull, Request
from nanoworks.tokenizer.tokenizer import Tokenizer

_GONE = "the engine stopped in the middle of this request; send it again"


@dataclass
class _Reader:
    """Where the deltas of one request go, while the engine works on it."""

    request_id: str
    unfinished: int
    """Samples that have not ended."""
    queue: asyncio.Queue[Delta | Exception] = field(default_factory=asyncio.Queue)


class RemoteEngine:
    """An `EngineClient`. Args: `spec`, what to run. The first four attributes are there after `wait`."""

    tokenizer: Tokenizer
    max_context: int
    config: EngineConfig
    """The settings, with what they leave to the device."""
    lineage: Mapping[str, Any]
    """What the checkpoint says of its making."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.error: EngineGone | None = None
        """Why nothing can be submitted any more."""
        self.gone = asyncio.Event()
        """Set when the process has ended, or has closed its side."""
        self._directory = tempfile.TemporaryDirectory(prefix="nanoworks-")
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = _start(theirs)
        with contextlib.suppress(OSError):  # one that ended already is noticed by `wait`
            self._socket.sendall(frame(pickle.dumps((spec, self._directory.name), protocol=5)))
        self._ready = self._ending = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connecting: asyncio.Future[Any] | None = None
        self._transport: asyncio.WriteTransport | None = None
        self._readers: dict[int, _Reader] = {}
        self._keys = count()
        self._sent = self._taken = 0
        self._stats: EngineStats | tuple[Any, ...] = NO_STATS
        self._sign = 0.0

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def silent_seconds(self) -> float:
        """How long requests have been waiting without any sign of the process; 0 where none waits."""
        return time.monotonic() - self._sign if self._readers else 0.0

    def wait(self) -> None:
        """Block until the model is loaded.

        Raises:
            UserError: it cannot be, and the user can mend that.
            EngineGone: the process ended by itself.
        """
        frames = Frames()
        hello: dict[str, Any] | None = None
        while hello is None:
            try:
                data = self._socket.recv(2**16)
            except ConnectionError:
                data = b""
            if not data:
                self.error = EngineGone(f"the engine's process ended {self._status()} while it loaded the model")
                self.shutdown()
                raise self.error
            hello = next((pickle.loads(message) for message in frames.feed(data)), None)
        if "error" in hello:
            self.error = EngineGone(hello["error"])
            self.shutdown()
            raise UserError(hello["error"])
        self.tokenizer = Tokenizer.load(self._directory.name)
        self._directory.cleanup()
        self.max_context, self.config, self.lineage = hello["max_context"], hello["config"], hello["lineage"]
        self._ready = True

    async def connect(self) -> None:
        """Receive in the running event loop from now on. Done by the first request, if nobody did it before."""
        if self._connecting is None:
            self._loop = loop = asyncio.get_running_loop()
            self._connecting = asyncio.ensure_future(
                loop.create_unix_connection(lambda: _Link(self), sock=self._socket)
            )
        await asyncio.shield(self._connecting)

    def submit(self, request: Request) -> AsyncGenerator[Delta, None]:
        self.check_queue()
        return self._read(request)

    def check_queue(self) -> None:
        if self.error is not None:
            raise self.error
        waiting, limit = self.stats().waiting + self._sent - self._taken, self.spec.config.max_queue
        if waiting >= limit:
            raise QueueFull(waiting, limit)

    def stats(self) -> EngineStats:
        """Those after the newest step; of a process that is gone, its last ones, but nothing is in use."""
        if isinstance(self._stats, tuple):  # most are never asked for
            self._stats = unpack_stats(self._stats)
        if self.error is not None:
            return replace(self._stats, running=0, waiting=0, blocks_used=0, blocks_cached=0)
        return self._stats

    def shutdown(self, *, timeout: float = 10) -> None:
        """End all requests with the reason "cancelled", and the process; it is killed after `timeout` seconds.

        From another thread than the event loop's, which is needed for the end of what is under way.
        """
        if not self._ready or self.error is not None:
            self.kill()
        elif self._loop is None or self._loop.is_closed():
            self._socket.close()
        else:
            with contextlib.suppress(RuntimeError):  # closed just now
                self._loop.call_soon_threadsafe(self._say_goodbye)
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.wait()
        if self._loop is None:
            self._socket.close()
        elif self._loop.is_running():
            asyncio.run_coroutine_threadsafe(self.gone.wait(), self._loop).result(timeout)
        self._directory.cleanup()

    def kill(self) -> None:
        """End the process at once, whatever it is at."""
        self._process.kill()

    async def ended(self) -> str:
        """Wait for the process, which is gone, and say how it ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):  # it may still be about to say why
            await asyncio.to_thread(self._process.wait, 5)
        await asyncio.to_thread(self.shutdown)
        return self._status()

    async def _read(self, request: Request) -> AsyncGenerator[Delta, None]:
        await self.connect()
        if self.error is not None:
            raise self.error
        if self._ending:
            raise EngineGone("the engine has stopped")
        key, reader = next(self._keys), _Reader(request.request_id, request.num_sequences)
        if not self._readers:
            self._sign = time.monotonic()
        self._readers[key] = reader
        self._sent += 1
        self._send("add", key, request)
        unfinished = request.num_sequences
        try:
            while unfinished:
                item = await reader.queue.get()
                if isinstance(item, Exception):
                    raise item
                unfinished -= item.finish_reason is not None
                yield item
        finally:
            if self._readers.pop(key, None) is not None:  # it is not only this side that is behind
                self._send("cancel", key, None)

    def _send(self, *order: Any) -> None:
        if self._transport is not None and not self._ending and self.error is None:
            self._transport.write(frame(pickle.dumps(order, protocol=5)))

    def _say_goodbye(self) -> None:
        if self._transport is not None and not self._ending and self.error is None:
            self._ending = True
            self._transport.write_eof()

    def _status(self) -> str:
        status = self._process.wait()
        return f"by signal {-status}" if status < 0 else f"with status {status}"

    # ------------------------------------------------------------------------------------- called by the link

    def _connected(self, transport: asyncio.WriteTransport) -> None:
        self._transport = transport

    def _report(self, message: bytes) -> None:
        self._sign = time.monotonic()
        report = unpack_report(message)
        self._taken, self._stats = report.taken, report.stats
        for row in report.rows:
            key = row[0]
            reader = self._readers.get(key)
            if reader is None:
                continue
            delta = delta_of(reader.request_id, row)
            reader.queue.put_nowait(delta)
            if delta.finish_reason is not None:
                reader.unfinished -= 1
                if not reader.unfinished:
                    del self._readers[key]
        for key, reason in report.refused:
            reader = self._readers.pop(key, None)
            if reader is not None:
                reader.queue.put_nowait(UserError(reason))

    def _lost(self) -> None:
        self.error = EngineGone("the engine has stopped" if self._ending else "the engine is not running")
        readers, self._readers = self._readers, {}
        for reader in readers.values():
            reader.queue.put_nowait(EngineGone(_GONE))
        self.gone.set()


class _Link(asyncio.Protocol):
    """Takes what the event loop reads from the socket."""

    def __init__(self, engine: RemoteEngine) -> None:
        self._engine, self._frames = engine, Frames()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._engine._connected(cast("asyncio.WriteTransport", transport))  # uvloop's is one, but no subclass

    def data_received(self, data: bytes) -> None:
        for message in self._frames.feed(data):
            self._engine._report(message)

    def connection_lost(self, error: Exception | None) -> None:
        self._engine._lost()


def _start(sock: socket.socket) -> subprocess.Popen[bytes]:
    """Start the worker in a session of its own, so that a terminal's Ctrl-C does not reach it.

    A fresh interpreter, not a child of multiprocessing: a script that makes an engine needs no `__main__` guard.
    """
    paths = [path or os.getcwd() for path in sys.path]
    return subprocess.Popen(
        [sys.executable, "-c", "from nanoworks.engine.remote.worker import main; main()", str(sock.fileno())],
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        pass_fds=[sock.fileno()],
        start_new_session=True,
    )
