"""Lets nobody in without a key, where keys are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from nanoworks.serve.errors import ApiError
from nanoworks.serve.middleware.respond import respond

if TYPE_CHECKING:
    from nanoworks.serve.auth.guard import Guard

PROBES = ("/live", "/health", "/ready")
ADMIN = ("/metrics",)


class Authenticate:
    """Puts the holder of the request's key into `scope["state"]["caller"]`, or answers 401 or 403.

    Open are the probes, and the chat page's own files: they are the same for everybody and ask for the key. A path is
    closed unless it is named here, so that a new route is.
    """

    def __init__(self, app: ASGIApp, *, guard: Guard) -> None:
        self._app = app
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and _is_open(scope)):
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            caller = await self._guard.caller(_bearer(Headers(scope=scope)))
            scope.setdefault("state", {})["caller"] = caller
            if scope["path"] in ADMIN and caller.role != "admin":
                raise ApiError(403, f"{scope['path']} needs the key of an admin", code="admin_only")
        except ApiError as error:
            await respond(error, send)
            return
        await self._app(scope, receive, send)


def _is_open(scope: Scope) -> bool:
    path: str = scope["path"]
    return path in PROBES or (scope["method"] in ("GET", "HEAD") and (path == "/" or path.startswith("/ui/")))


def _bearer(headers: Headers) -> str | None:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else None
