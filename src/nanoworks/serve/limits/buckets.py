"""Token buckets: a minute's worth of requests and of tokens that fill again continuously, and requests at a time.

What an answer will cost is not known when it begins. So a request takes its prompt's tokens from the bucket, and the
answer's at its end; the bucket may then be in debt, and the next request waits until it is paid. Over time nobody gets
more than the rate. A prompt longer than the whole bucket waits until that is full.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from nanoworks.serve.caller import Limits

_ROUNDING = 1e-6  # seconds: who waited as long as told must not be refused for the last bit of a sum

Kind = Literal["requests", "tokens", "concurrent"]


@dataclass(frozen=True)
class Level:
    """Of one bucket, after a decision."""

    limit: int
    remaining: int
    reset_seconds: float
    """Until it is full again."""


@dataclass(frozen=True)
class Decision:
    refused: Kind | None = None
    """The limit that was in the way; then nothing was taken from any."""
    retry_after: float = 0.0
    """Seconds until it is worth trying again."""
    requests: Level | None = None
    tokens: Level | None = None


class Buckets(Protocol):
    """Where the buckets are. `key` names their owner, `lease` one request between `begin` and `end`."""

    async def begin(self, key: str, limits: Limits, *, tokens: int, lease: str) -> Decision:
        """Take one request and `tokens`, or nothing at all."""

    async def end(self, key: str, limits: Limits, *, tokens: int, lease: str) -> None:
        """Give the lease back and take `tokens` more (negative: give some back)."""

    async def close(self) -> None: ...


@dataclass
class _Account:
    requests: float
    tokens: float
    at: float
    leases: set[str] = field(default_factory=set)


class MemoryBuckets:
    """For one server. `clock` returns seconds."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    async def begin(self, key: str, limits: Limits, *, tokens: int, lease: str) -> Decision:
        account = self._account(key, limits)
        refused, wait = _in_the_way(account, limits, tokens)
        if refused is None:
            account.requests -= 1
            account.tokens -= tokens
            account.leases.add(lease)
        requests = _level(account.requests, limits.requests_per_minute)
        return Decision(refused, wait, requests, _level(account.tokens, limits.tokens_per_minute))

    async def end(self, key: str, limits: Limits, *, tokens: int, lease: str) -> None:
        account = self._account(key, limits)
        account.tokens -= tokens
        account.leases.discard(lease)

    async def close(self) -> None:
        pass

    def _account(self, key: str, limits: Limits) -> _Account:
        """Return the account as it is now."""
        now = self._clock()
        account = self._accounts.setdefault(key, _Account(math.inf, math.inf, now))
        minutes = max(0.0, now - account.at) / 60
        account.requests = _filled(account.requests, limits.requests_per_minute, minutes)
        account.tokens = _filled(account.tokens, limits.tokens_per_minute, minutes)
        account.at = now
        return account


def _filled(level: float, limit: int | None, minutes: float) -> float:
    return math.inf if limit is None else min(limit, level + minutes * limit)


def _in_the_way(account: _Account, limits: Limits, tokens: int) -> tuple[Kind | None, float]:
    """Return the limit that refuses a request, if one does, and for how many seconds."""
    if limits.concurrent_requests is not None and len(account.leases) >= limits.concurrent_requests:
        return "concurrent", 1.0
    requests = _wait(account.requests, limits.requests_per_minute, 1)
    if requests > _ROUNDING:
        return "requests", requests
    more_tokens = _wait(account.tokens, limits.tokens_per_minute, tokens)
    return ("tokens", more_tokens) if more_tokens > _ROUNDING else (None, 0.0)


def _wait(level: float, limit: int | None, wanted: int) -> float:
    return 0.0 if limit is None else (min(wanted, limit) - level) * 60 / limit


def _level(level: float, limit: int | None) -> Level | None:
    return None if limit is None else Level(limit, max(0, int(level)), (limit - level) * 60 / limit)
