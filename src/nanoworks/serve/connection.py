"""HTTP's own limits, which no application sees: a request that never begins, and headers without end."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_REFUSAL = b"the headers of this request are too large"
_LINGER_SECONDS = 2  # for what is still on its way: closing on unread bytes would take the answer away, too


class Connection(HttpToolsProtocol):
    """uvicorn's connection with two limits.

    `max_header_bytes` holds to within what one read of the socket brings; `header_seconds` are those from the
    connection, or from a request's first byte, to the end of its headers.
    """

    max_header_bytes: int
    header_seconds: float

    _deadline: asyncio.TimerHandle | None = None
    _header_bytes = 0
    _refused = False

    @classmethod
    def with_limits(cls, *, max_header_bytes: int, header_seconds: float) -> type[Connection]:
        limits = {"max_header_bytes": max_header_bytes, "header_seconds": header_seconds}
        return type("LimitedConnection", (cls,), limits)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._have_headers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        if self._deadline is not None:
            self._header_bytes += len(data)
            if self._header_bytes > self.max_header_bytes:
                self._refuse()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._await_headers()

    def on_headers_complete(self) -> None:
        self._have_headers()
        super().on_headers_complete()

    def _await_headers(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.header_seconds, self.transport.close)
            self._header_bytes = 0

    def _have_headers(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _refuse(self) -> None:
        self._refused = True
        self._have_headers()
        head = f"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Length: {len(_REFUSAL)}\r\n"
        self.transport.write(head.encode() + b"Content-Type: text/plain\r\nConnection: close\r\n\r\n" + _REFUSAL)
        self.loop.call_later(_LINGER_SECONDS, self.transport.close)
