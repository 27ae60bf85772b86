"""The process of a `RemoteEngine`: builds the engine, then takes orders and reports every step until its socket ends.

One thread does it all, so that nothing competes with the steps for the interpreter. What goes wrong ends the process
with a traceback, and that is how the server learns of it.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from nanoworks.common.errors import UserError
from nanoworks.engine.engine import Engine
from nanoworks.engine.remote.build import build
from nanoworks.engine.remote.wire import Frames, Row, frame, pack_report, row_of

_CHUNK = 2**18  # bytes read at once


class Worker:
    """Serves `engine` over `sock`."""

    def __init__(self, engine: Engine, orders: Orders) -> None:
        self._engine, self._orders = engine, orders
        self._keys: dict[str, int] = {}  # request id -> key, of those not yet ended
        self._ids: dict[int, str] = {}
        self._unfinished: dict[int, int] = {}  # samples of each
        self._taken = 0

    def run(self) -> None:
        """Step until the server closes its side; then end what is under way as cancelled."""
        reported = b""
        while not self._orders.ended:
            refused = self._take(wait=not self._engine.has_work)
            rows = self._rows()
            report = pack_report(self._taken, self._engine.stats(), rows, refused)
            if rows or report != reported:
                self._orders.answer(report)
                reported = report
        for request_id in list(self._keys):
            self._engine.cancel(request_id)
        self._orders.answer(pack_report(self._taken, self._engine.stats(), self._rows(), []))

    def _take(self, *, wait: bool) -> list[tuple[int, str]]:
        """Do what was ordered; return the requests that can never run."""
        refused = []
        for name, key, request in self._orders.take(wait=wait):
            if name == "cancel":
                if key in self._ids:
                    self._engine.cancel(self._ids[key])
                continue
            self._taken += 1
            try:
                self._engine.add(request)
            except UserError as error:
                refused.append((key, str(error)))
                continue
            self._keys[request.request_id], self._ids[key] = key, request.request_id
            self._unfinished[key] = request.num_sequences
        return refused

    def _rows(self) -> list[Row]:
        rows = []
        for delta in self._engine.step():
            key = self._keys[delta.request_id]
            rows.append(row_of(key, delta))
            if delta.finish_reason is not None:
                self._unfinished[key] -= 1
                if not self._unfinished[key]:
                    del self._unfinished[key], self._keys[delta.request_id], self._ids[key]
        return rows


class Orders:
    """The engine's end of the socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket, self._frames = sock, Frames()
        self._first: list[Any] = []
        self.ended = False

    def take(self, *, wait: bool) -> list[Any]:
        """Return the orders that have come in; `wait` for one if there is none."""
        orders, self._first = self._first, []
        while not self.ended:
            try:
                data = self._socket.recv(_CHUNK, 0 if wait and not orders else socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except ConnectionError:
                data = b""
            self.ended = not data
            orders += map(pickle.loads, self._frames.feed(data))
        return orders

    def first(self) -> Any:
        """Wait for one order; those after it stay for `take`. EOFError when none comes."""
        first, *self._first = self.take(wait=True) or [None]
        if first is None:
            raise EOFError("the server left")
        return first

    def answer(self, report: bytes) -> None:
        self._socket.sendall(frame(report))


def main() -> None:
    """Run with the number of an inherited socket as the only argument."""
    # Whoever ends the server ends it alone; it says when this process has nothing more to do.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.dup2(2, 1)  # the server's standard output is its own
    sock = socket.socket(fileno=int(sys.argv[1]))
    sock.set_inheritable(False)
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    orders = Orders(sock)
    try:
        spec, directory = orders.first()
        try:
            engine, lineage = build(spec)
        except UserError as error:
            orders.answer(pickle.dumps({"error": str(error)}))
            return
        assert engine.tokenizer is not None
        engine.tokenizer.save(Path(directory))
        hello = {"max_context": engine.max_context, "config": engine.config, "lineage": dict(lineage)}
        gc.freeze()  # what is there now stays: looking through it for garbage would hold up a step by 0.1 s
        orders.answer(pickle.dumps(hello))
        Worker(engine, orders).run()
    except (BrokenPipeError, ConnectionResetError, EOFError):
        pass  # the server is gone, and with it whoever would want to know
    finally:
        sys.stderr.flush()
    os._exit(0)  # at once, instead of a second later


def _leave_with(parent: int) -> None:
    """End this process, even in a step that never ends, when the server is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    time.sleep(2)  # the closed socket ends most of them before
    os._exit(1)


if __name__ == "__main__":
    main()
