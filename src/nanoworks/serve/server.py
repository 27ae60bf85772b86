"""Runs the app under uvicorn: takes the port, prints where it is, ends cleanly on Ctrl-C and SIGTERM."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import json
import signal
import socket
from types import FrameType
from typing import NoReturn

import uvicorn
from fastapi import FastAPI

from nanoworks.common.errors import UserError
from nanoworks.engine import AsyncEngine

GRACE_SECONDS = 5  # how long answers under way may go on after a signal


def listen(host: str, port: int) -> socket.socket:
    """Return a socket bound to `host:port` (port 0: a free one). UserError when that cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror:
        raise UserError(f"unknown host {host!r}; use 127.0.0.1, or 0.0.0.0 for every interface") from None
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
        sock.listen()
    except OSError as error:
        sock.close()
        raise UserError(f"cannot listen on {host}:{port}: {_fix(error)}") from None
    return sock


def run(app: FastAPI, sock: socket.socket, *, model: str) -> None:
    """Serve `app` on `sock` until a signal; then exit with status 0. `model` is its name in the API."""
    # uvicorn raises the signal that ended it again, once it has shut down; this is who receives it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    Server(app, announcement=_announcement(model, sock)).run(sockets=[sock])


class Server(uvicorn.Server):
    """Prints `announcement` once requests are answered; when told to stop, ends what does not end by itself."""

    def __init__(self, app: FastAPI, *, announcement: str) -> None:
        # uvicorn's own limit cuts connections with a traceback each, so it comes only after ours.
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                lifespan="on",
                timeout_graceful_shutdown=GRACE_SECONDS + 5,
            )
        )
        self._engine: AsyncEngine = app.state.engine
        self._announcement = announcement

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._announcement, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        end_answers = loop.call_later(GRACE_SECONDS, loop.run_in_executor, None, self._engine.shutdown)
        await super().shutdown(sockets)
        end_answers.cancel()


def _announcement(model: str, sock: socket.socket) -> str:
    address, port, *_ = sock.getsockname()
    ip = ipaddress.ip_address(address)
    host = "127.0.0.1" if ip.is_unspecified else f"[{ip}]" if ip.version == 6 else str(ip)
    url = f"http://{host}:{port}"
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Who are you?"}]})
    lines = [
        f"Serving {model}: open {url} to chat (Ctrl-C stops), or",
        "",
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\",
        f"    -d '{body}'",
    ]
    if not ip.is_loopback:
        lines += ["", "There is no authentication: whoever reaches this port can use the model."]
    return "\n".join(lines)


def _fix(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "the port is in use; stop the program that has it, or take another --port (0 picks a free one)"
    if error.errno == errno.EACCES:
        return "ports below 1024 need privileges; take a higher one, e.g. --port 8000"
    if error.errno == errno.EADDRNOTAVAIL:
        return "this machine has no such address; use --host 127.0.0.1, or 0.0.0.0 for every interface"
    return str(error.strerror)


def _leave(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)
