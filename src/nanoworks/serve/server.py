"""Runs the app under uvicorn: takes the port, prints where it is, ends cleanly on Ctrl-C and SIGTERM."""

from __future__ import annotations

import asyncio
import errno
import gc
import ipaddress
import json
import logging
import math
import signal
import socket
import ssl
from types import FrameType
from typing import Literal, NoReturn

import uvicorn
from fastapi import FastAPI

from nanoworks.common.errors import UserError
from nanoworks.engine.client import EngineClient
from nanoworks.serve.settings import ServerSettings
from nanoworks.serve.supervisor import Supervisor

log = logging.getLogger("nanoworks")

MOST_FILES = 2**16


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
    _allow_many_connections()
    state = app.state.server
    tls = state.settings.tls_cert is not None
    announcement = _announcement(model, sock, keyed=state.guard is not None, tls=tls)
    Server(app, announcement=announcement).run(sockets=[sock])


class Server(uvicorn.Server):
    """Prints `announcement` once requests are answered; when told to stop, ends what does not end by itself."""

    def __init__(self, app: FastAPI, *, announcement: str) -> None:
        self._settings: ServerSettings = app.state.server.settings
        self._engine: EngineClient = app.state.server.engine
        self._announcement = announcement
        super().__init__(
            uvicorn.Config(
                app,
                http=_protocol(self._settings),
                log_level="warning",
                access_log=False,
                server_header=False,
                lifespan="on",
                ssl_certfile=self._settings.tls_cert,
                ssl_keyfile=self._settings.tls_key,
                # uvicorn's own limit cuts connections with a traceback each, so it comes only after ours.
                timeout_graceful_shutdown=math.ceil(self._settings.drain_seconds) + 5,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if isinstance(self._engine, Supervisor):
            self._engine.start()
        await super().startup(sockets)
        gc.freeze()  # what is there now stays, and is not looked through for garbage while answers wait
        print(self._announcement, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        end_answers = loop.call_later(self._settings.drain_seconds, loop.run_in_executor, None, self._engine.shutdown)
        running = len(self.server_state.tasks)
        if running:
            log.warning(
                "Finishing %d answers, for %g s at most; Ctrl-C ends them now", running, self._settings.drain_seconds
            )
        await super().shutdown(sockets)
        end_answers.cancel()


def check_tls(settings: ServerSettings) -> None:
    """Raise UserError where the certificate and the key cannot be used together."""
    if settings.tls_cert is None:
        if settings.tls_key is not None:
            raise UserError("--tls-key needs the certificate, too: --tls-cert FILE")
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.tls_cert, settings.tls_key, _no_password)
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        files = " and ".join(file for file in (settings.tls_cert, settings.tls_key) if file)
        raise UserError(
            f"cannot use {files} for TLS ({error}); give PEM files of one certificate and its key"
        ) from None


def _no_password() -> str:
    raise ValueError("the key has a password")  # instead of a prompt in the terminal


def _protocol(settings: ServerSettings) -> type[asyncio.Protocol] | Literal["auto"]:
    """What speaks HTTP: httptools, or what uvicorn brings, which has limits of its own."""
    try:
        from nanoworks.serve.connection import Connection
    except ImportError:
        return "auto"
    return Connection.with_limits(max_header_bytes=settings.max_header_bytes, header_seconds=settings.header_seconds)


def _allow_many_connections() -> None:
    """Take as many open files as the system lets this process have: each connection is one."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, MOST_FILES) if hard != resource.RLIM_INFINITY else MOST_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _announcement(model: str, sock: socket.socket, *, keyed: bool, tls: bool) -> str:
    address, port, *_ = sock.getsockname()
    ip = ipaddress.ip_address(address)
    host = "127.0.0.1" if ip.is_unspecified else f"[{ip}]" if ip.version == 6 else str(ip)
    url = f"{'https' if tls else 'http'}://{host}:{port}"
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Who are you?"}]})
    lines = [
        f"Serving {model}: open {url} to chat (Ctrl-C stops), or",
        "",
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\",
        *(['    -H "Authorization: Bearer $KEY" \\'] if keyed else []),
        f"    -d '{body}'",
    ]
    if not ip.is_loopback and not keyed:
        lines += ["", "There is no authentication: whoever reaches this port can use the model (see --auth)."]
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
