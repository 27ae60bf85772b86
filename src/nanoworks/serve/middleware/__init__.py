"""What every request passes before it reaches a route. Plain ASGI: a wrapper per response would slow streams down."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from nanoworks.serve.middleware.access_log import AccessLog, open_log
from nanoworks.serve.middleware.authenticate import Authenticate
from nanoworks.serve.middleware.body_size import BodySize
from nanoworks.serve.settings import ServerSettings

if TYPE_CHECKING:
    from nanoworks.serve.auth.guard import Guard


def add_middleware(app: FastAPI, settings: ServerSettings, guard: Guard | None) -> None:
    """Put the layers around `app`, the innermost first."""
    if guard is not None:
        app.add_middleware(Authenticate, guard=guard)
    app.add_middleware(BodySize, limit=settings.max_body_bytes)
    if settings.cors_origins:
        # Outside of the keys: a browser asks whether it may ask, and sends no key with that.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    app.add_middleware(AccessLog, log=open_log(settings.access_log))
