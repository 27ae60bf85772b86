"""Answers that come in pieces, and clients that leave before the end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi.responses import Response
from starlette.types import Message, Receive, Scope, Send

from nanoworks.serve.errors import as_api_error

T = TypeVar("T")

CLIENT_LEFT = 499  # nginx's status for a request whose client went away; nobody is there to read it
_DONE = b"data: [DONE]\n\n"


class EventStream(Response):
    """Server-sent events: `events` yields them whole, `data: ...` and a blank line.

    The response begins with the first of them, so that what goes wrong before still gets its own status; what goes
    wrong later becomes the last event. When the client leaves, `events` is closed at once.
    """

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        # Proxies that buffer would turn the stream into one block.
        super().__init__(
            media_type="text/event-stream; charset=utf-8",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await unless_client_leaves(receive, self._pump(send))

    async def _pump(self, send: Send) -> None:
        started = False
        async with aclosing(self._events) as events:
            try:
                async for event in events:
                    if not started:
                        started = True
                        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    await send(_body(event))
            except Exception as error:
                if not started:
                    raise
                await send(_body(event_of(as_api_error(error).body.model_dump())))
        await send(_body(_DONE, more=False))


def event_of(content: Any) -> bytes:
    """Return one server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _body(content: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": content, "more_body": more}


async def unless_client_leaves(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """Return what `work` returns, or cancel it and return None when the client disconnects first."""

    async def client_left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(client_left())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
