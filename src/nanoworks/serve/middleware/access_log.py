"""Gives each request an id and, when it is answered, one line of JSON in the access log.

Outside of everything that may refuse a request or fail, so that every answer has its id and its line.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import re
import sys
import time
import uuid
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanoworks.common.errors import UserError
from nanoworks.serve.auth.keys import redact
from nanoworks.serve.errors import as_api_error
from nanoworks.serve.middleware.record import RequestRecord, current_record, set_current_record
from nanoworks.serve.middleware.respond import respond
from nanoworks.serve.observer import Observer
from nanoworks.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nanoworks.serve.generation import Generation

# Asked every few seconds by machines: only a failure of theirs is worth a line.
QUIET = ("/live", "/health", "/ready", "/metrics")
_USABLE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def open_log(to: str | None) -> logging.Handler | None:
    """Return what writes lines to the file `to`, or to standard error for "-"; None for None.

    Raises:
        UserError: the file cannot be written.
    """
    if to is None:
        return None
    try:
        # This kind of file may be moved away by logrotate: it is then opened anew.
        return logging.StreamHandler(sys.stderr) if to == "-" else logging.handlers.WatchedFileHandler(to)
    except OSError as error:
        raise UserError(f"cannot write the access log {to}: {error.strerror}") from None


class AccessLog:
    """Writes to `log`, which it closes when the server ends; None: no log, only ids."""

    def __init__(self, app: ASGIApp, *, log: logging.Handler | None) -> None:
        self._app = app
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            if scope["type"] == "lifespan" and self._log is not None:
                self._log.close()
            return
        record = RequestRecord(_request_id(Headers(scope=scope).get("x-request-id", "")))
        set_current_record(record)
        began, status, size = time.perf_counter(), 0, 0

        async def send_and_count(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = record.request_id
                for name, value in record.headers.items():
                    headers[name] = value
            elif message["type"] == "http.response.body":
                size += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, send_and_count)
        except Exception as error:
            # Here and not in the framework's last resort, which is outside of us and knows no id.
            known = as_api_error(error)
            if not status:
                await respond(known, send_and_count)
        finally:
            if self._log is not None and not (scope["path"] in QUIET and status < 400):
                line = redact(_line(scope, record, status, size, time.perf_counter() - began))
                self._log.handle(logging.makeLogRecord({"msg": line}))


class RecordGenerations(Observer):
    """Adds to a request's record what its generations used.

    Args:
        tokenizer: None, or what turns prompts back into text for the log.
    """

    def __init__(self, tokenizer: Tokenizer | None = None) -> None:
        self._tokenizer = tokenizer

    async def admit(self, job: Generation) -> None:
        record = current_record()
        if record is not None and self._tokenizer is not None:
            record.prompts.append(self._tokenizer.decode(list(job.prompt_ids)))

    async def finished(self, job: Generation) -> None:
        record = current_record()
        if record is not None:
            record.prompt_tokens += job.prompt_tokens
            record.completion_tokens += job.completion_tokens
            record.finish_reasons += job.finish_reasons
            record.queue_seconds = job.queue_seconds


def _request_id(given: str) -> str:
    return given if _USABLE_ID.fullmatch(given) and redact(given) == given else uuid.uuid4().hex


def _line(scope: Scope, record: RequestRecord, status: int, size: int, seconds: float) -> str:
    caller = scope.get("state", {}).get("caller")
    client = scope.get("client")
    line: dict[str, Any] = {
        "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        "request_id": record.request_id,
        "client": client[0] if client else None,
        "key": caller.key_id if caller else "",
        "method": scope["method"],
        "path": scope["path"],  # without the query, where people put secrets
        "status": status or 499,  # nginx's for a client that went away before its answer began
        "bytes": size,
        "seconds": round(seconds, 4),
    }
    if record.finish_reasons or record.prompt_tokens:
        line["prompt_tokens"] = record.prompt_tokens
        line["completion_tokens"] = record.completion_tokens
        line["finish_reasons"] = record.finish_reasons
        line["queue_seconds"] = record.queue_seconds and round(record.queue_seconds, 4)
    if record.prompts:
        line["prompts"] = record.prompts
    return json.dumps(line, ensure_ascii=False)
