"""Every error leaves the server in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from nanoworks.common.errors import UserError
from nanoworks.engine import QueueFull
from nanoworks.engine.client import EngineGone
from nanoworks.serve.protocol.common import ErrorBody, ErrorDetail

log = logging.getLogger("nanoworks")


class ApiError(Exception):
    """An answer other than 200.

    Args:
        status: of HTTP.
        message: names the fix.
        param: the field at fault.
        code: for programs.
        retry_after: seconds after which the same request may be answered.
        headers: further ones of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["Retry-After"] = str(max(1, math.ceil(retry_after)))
        kind = "rate_limit_error" if status == 429 else "invalid_request_error" if status < 500 else "server_error"
        self.body = ErrorBody(error=ErrorDetail(message=message, type=kind, param=param, code=code))


def as_api_error(error: Exception) -> ApiError:
    """Return what the client may know of `error`: all of a mistake of its own, nothing of a bug of ours."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), code="queue_full", retry_after=1)
    if isinstance(error, EngineGone):
        message = "the engine went away during this request and is started again; send it once more"
        return ApiError(503, message, retry_after=1)
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    if isinstance(error, RequestValidationError):
        return _invalid_body(error)
    if isinstance(error, RecursionError):
        return ApiError(400, "the body is nested too deeply; send a flatter one")
    log.error("a request failed", exc_info=error)
    return ApiError(500, "internal error; see the server's log")


def error_response(error: ApiError) -> Response:
    # In ASCII: the message may quote half a surrogate pair, which no other encoding can hold.
    content = json.dumps(error.body.model_dump(), separators=(",", ":")).encode()
    return Response(content, error.status, headers=error.headers, media_type="application/json")


def add_error_handlers(app: FastAPI) -> None:
    async def answer(_: Request, error: Exception) -> Response:
        return error_response(as_api_error(error))

    for kind in (ApiError, UserError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, answer)


def _invalid_body(error: RequestValidationError) -> ApiError:
    errors = error.errors()
    first = errors[0]  # one fault at a time reads better than a list
    # Of a field with several types the one that the value nearly fits: it got furthest.
    of_field = [e for e in errors if e["loc"][:2] == first["loc"][:2]]
    first = max(of_field, key=lambda e: (_path(e["loc"][1:], error.body).count("."), not e["type"].endswith("_type")))
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['ctx']['error']} at character {first['loc'][-1]}")
    if first["type"] in ("model_attributes_type", "dict_type", "missing") and len(first["loc"]) == 1:
        return ApiError(400, "the body must be a JSON object, sent as Content-Type: application/json")
    param = _path(first["loc"][1:], error.body)  # after "body"
    ours = {"extra_forbidden": "this field is not known", "none_required": "is not supported here; leave it out"}
    message = ours.get(first["type"], first["msg"])
    return ApiError(400, f"{param}: {message}" if param else message, param=param or None)


def _path(steps: Sequence[int | str], body: Any) -> str:
    """Return where in `body` an error is: `steps` without those that name an alternative of a type."""
    kept, here = [], body
    for i, step in enumerate(steps):
        last_of_an_object = i == len(steps) - 1 and isinstance(here, dict)
        if isinstance(here, dict) and step in here:
            here = here[step]
        elif isinstance(here, list) and isinstance(step, int):
            here = here[step] if step < len(here) else None
        elif not last_of_an_object:  # which would be what is missing
            continue
        kept.append(str(step))
    return ".".join(kept)
