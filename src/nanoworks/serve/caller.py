"""Who sends a request: put into `scope["state"]["caller"]` before any route runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from starlette.requests import HTTPConnection

Role = Literal["user", "admin"]


@dataclass(frozen=True)
class Limits:
    """What one caller may use; None is without a limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Prompt and answer together."""
    concurrent_requests: int | None = None
    tokens_per_month: int | None = None
    """The quota: prompt and answer together, in a calendar month of UTC."""


@dataclass(frozen=True)
class Caller:
    """The holder of a key, or anybody where no key is asked for."""

    key_id: str = ""
    """The key's public part, in logs and in accounts; empty for anybody."""
    name: str = "anonymous"
    role: Role = "user"
    limits: Limits = Limits()


ANONYMOUS = Caller()


def caller_of(connection: HTTPConnection) -> Caller:
    """Return who sent this request."""
    caller = connection.scope.get("state", {}).get("caller", ANONYMOUS)
    assert isinstance(caller, Caller)
    return caller
