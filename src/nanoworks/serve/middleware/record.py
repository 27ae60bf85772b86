"""What becomes known about one HTTP request while it is answered: its line in the access log is made of it."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any


@dataclass
class RequestRecord:
    request_id: str
    """The client's `x-request-id`, or a new one; it is sent back."""
    headers: dict[str, str] = field(default_factory=dict)
    """To be added to the response, if it has not begun."""
    ticket: Any = None
    """The limiter's, once the first of the request's prompts was let in."""
    prompts: list[str] = field(default_factory=list)
    """Only where the operator wants them in the log."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)
    queue_seconds: float | None = None


# Tasks that a request starts inherit it, so that whoever looks on at a generation finds the request it belongs to.
_current: ContextVar[RequestRecord | None] = ContextVar("nanoworks_request", default=None)


def current_record() -> RequestRecord | None:
    """Return the record of the request that is being answered here, if there is one."""
    return _current.get()


def set_current_record(record: RequestRecord) -> None:
    _current.set(record)
