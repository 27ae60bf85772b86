"""Every error leaves the server in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from nanoworks.common.errors import UserError
from nanoworks.engine import QueueFull
from nanoworks.serve.protocol import ErrorBody, ErrorDetail

log = logging.getLogger("nanoworks")


class ApiError(Exception):
    """An answer other than 200. `param` names the field at fault, `code` is for programs."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "rate_limit_error" if status == 429 else "invalid_request_error" if status < 500 else "server_error"
        self.body = ErrorBody(error=ErrorDetail(message=message, type=kind, param=param, code=code))


def as_api_error(error: Exception) -> ApiError:
    """Return what the client may know of `error`: all of a mistake of its own, nothing of a bug of ours."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), code="queue_full")
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail))
    if isinstance(error, RequestValidationError):
        return _invalid_body(error)
    log.error("a request failed", exc_info=error)
    return ApiError(500, "internal error; see the server's log")


def add_error_handlers(app: FastAPI) -> None:
    async def answer(_: Request, error: Exception) -> JSONResponse:
        known = as_api_error(error)
        return JSONResponse(known.body.model_dump(), known.status)

    for kind in (ApiError, UserError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, answer)


def _invalid_body(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]  # one fault at a time reads better than a list
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON")
    param = ".".join(str(step) for step in first["loc"] if step != "body")
    message = "this field is not known" if first["type"] == "extra_forbidden" else first["msg"]
    return ApiError(400, f"{param}: {message}" if param else message, param=param or None)
