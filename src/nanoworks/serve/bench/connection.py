"""A client's connection that does as little as it can for each piece of an answer.

Spoken with httptools in callbacks of asyncio: nothing is woken but at the end of an answer. On a machine that it shares
with the server, a client's time would be missing there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import cast

import httptools

Piece = Callable[[bytes, float], None]
"""Takes some bytes of a body, and when they came (seconds of `time.perf_counter`)."""


class Connection(asyncio.Protocol):
    """One request at a time over one socket."""

    def __init__(self) -> None:
        self.gone = False
        """Whether the server closed it, as it does after some seconds without a request."""
        self._transport: asyncio.Transport | None = None
        self._answer: _Answer | None = None
        self._broken: Exception | None = None

    async def post(self, head: bytes, body: bytes, piece: Piece) -> int:
        """Send a request and wait for the end of its answer, of which `piece` gets the body; return its status.

        Args:
            head: all lines before the one that says the body's length.

        Raises:
            ConnectionError: the server left before the end, or answered what is no HTTP.
        """
        assert self._transport is not None
        if self.gone:
            raise ConnectionError("the server closed the connection")
        self._answer = answer = _Answer(piece)
        self._transport.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        try:
            return await answer.done
        finally:
            self._answer = None

    @property
    def reusable(self) -> bool:
        return not self.gone and self._transport is not None and not self._transport.is_closing()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    # ------------------------------------------------------------------------------------ called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        if answer is None:  # nobody asked
            self.close()
            return
        try:
            answer.feed(data)
        except httptools.HttpParserError as error:
            answer.fail(ConnectionError(f"the server answers what is no HTTP ({error})"))
            self.close()
        if answer.last:
            self.gone = True
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.gone = True
        if self._answer is not None:
            self._answer.cut(error)


class _Answer:
    """What is known of the answer to one request; the methods named on_... are called by the parser."""

    def __init__(self, piece: Piece) -> None:
        self.done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.last = False
        """Whether the server will take no other request on this connection."""
        self._parser = httptools.HttpResponseParser(self)
        self._piece = piece
        self._arrived = 0.0
        self._until_closed = True
        self._begun = False

    def feed(self, data: bytes) -> None:
        self._arrived = time.perf_counter()
        self._parser.feed_data(data)

    def cut(self, error: Exception | None) -> None:
        """The connection is gone: the end of an answer that names no length, the failure of any other."""
        if self._begun and self._until_closed and error is None:
            self._finish()
        else:
            self.fail(ConnectionError(str(error or "the server closed the connection before the end of its answer")))

    def fail(self, error: OSError) -> None:
        if not self.done.done():
            self.done.set_exception(error)

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._until_closed = False

    def on_headers_complete(self) -> None:
        self._begun = True

    def on_body(self, data: bytes) -> None:
        self._piece(data, self._arrived)

    def on_message_complete(self) -> None:
        self.last = not self._parser.should_keep_alive()
        self._finish()

    def _finish(self) -> None:
        if not self.done.done():
            self.done.set_result(self._parser.get_status_code())
