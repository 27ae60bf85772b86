"""The API's own description at /openapi.json: what FastAPI finds in the routes, and the errors of them all."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from nanoworks.serve.middleware.authenticate import PROBES
from nanoworks.serve.protocol.common import ErrorBody

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is wrong, not allowed, or too much."},
    "5XX": {"model": ErrorBody, "description": "The server failed, has no engine at the moment, or is stopping."},
}
"""Of every route. 4XX also keeps FastAPI from promising 422, which nobody gets here."""


def add_document(app: FastAPI, *, auth: bool) -> None:
    """Make `app.openapi` return the document; `auth`: a key is asked for."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
            if auth:
                schemes = found.setdefault("components", {}).setdefault("securitySchemes", {})
                schemes["key"] = {"type": "http", "scheme": "bearer"}
                found["security"] = [{"key": []}]
                for path in PROBES:
                    found["paths"][path]["get"]["security"] = []
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
