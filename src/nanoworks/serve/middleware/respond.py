"""An answer from outside of the routes."""

from __future__ import annotations

from fastapi.responses import JSONResponse
from starlette.types import Message, Send

from nanoworks.serve.errors import ApiError


async def respond(error: ApiError, send: Send) -> None:
    """Answer with `error` and close the connection: the rest of the request is not read."""
    response = JSONResponse(error.body.model_dump(), error.status, headers={**error.headers, "Connection": "close"})
    await response({"type": "http"}, _nothing, send)


async def _nothing() -> Message:
    raise AssertionError("a finished response reads nothing")
