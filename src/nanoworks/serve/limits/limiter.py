"""Holds every generation to the limits of its caller's key, and writes down what it used."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from nanoworks.serve.auth.ledger import Ledger, Usage
from nanoworks.serve.caller import Limits
from nanoworks.serve.errors import ApiError
from nanoworks.serve.limits.buckets import Buckets, Decision, MemoryBuckets
from nanoworks.serve.middleware.record import current_record
from nanoworks.serve.observer import Observer

if TYPE_CHECKING:
    from nanoworks.serve.generation import Generation

log = logging.getLogger("nanoworks")

_SHARED_RETRY_SECONDS = 5.0  # how long to leave a Redis alone that did not answer


@dataclass
class _Ticket:
    """What lets one HTTP request in. Its prompts share it: they are one request, which runs until the last ends."""

    entering: asyncio.Lock = field(default_factory=asyncio.Lock)
    prompts: int = 0
    """Running now."""
    buckets: Buckets | None = None
    lease: str = ""
    paid: int = 0
    """Tokens that the first prompt took at its beginning; what the others need becomes known at their end."""


class Limiter(Observer):
    """Asks `shared` buckets where there are some; while they do not answer, this server counts by itself.

    Args:
        ledger: knows the month's usage; gets what each generation used.
        shared: of several servers; it may raise anything.
        clock: Unix seconds.
    """

    def __init__(
        self, ledger: Ledger, *, shared: Buckets | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._ledger = ledger
        self._own = MemoryBuckets()
        self._shared = shared
        self._shared_again_at = 0.0
        self._clock = clock
        self._tickets: dict[str, _Ticket] = {}

    async def close(self) -> None:
        if self._shared is not None:
            await self._shared.close()

    async def admit(self, job: Generation) -> None:
        quota = job.caller.limits.tokens_per_month
        if quota is not None:
            await self._check_quota(job.caller.key_id, quota)
        record = current_record()
        ticket = (record and record.ticket) or _Ticket()
        if record is not None:
            record.ticket = ticket
        async with ticket.entering:
            if not ticket.prompts and job.caller.limits != Limits(tokens_per_month=quota):
                await self._begin(ticket, job)
            ticket.prompts += 1
        self._tickets[job.request_id] = ticket

    async def finished(self, job: Generation) -> None:
        ticket = self._tickets.pop(job.request_id)
        ticket.prompts -= 1
        last = not ticket.prompts
        # One that never reached a step, refused later or cancelled in the queue, costs nothing.
        prompt = job.prompt_tokens if job.queue_seconds is not None else 0
        used = Usage(int(last), prompt, job.completion_tokens)
        self._ledger.add(job.caller.key_id, used)
        if ticket.buckets is None:
            return
        tokens, lease = used.tokens - ticket.paid, ticket.lease if last else ""
        ticket.paid = 0
        try:
            await ticket.buckets.end(job.caller.key_id, job.caller.limits, tokens=tokens, lease=lease)
        except Exception as error:
            self._lost(error)

    async def _begin(self, ticket: _Ticket, job: Generation) -> None:
        caller, lease, tokens = job.caller, job.request_id, job.prompt_tokens
        buckets: Buckets = self._own
        if self._shared is not None and time.monotonic() >= self._shared_again_at:
            try:
                decision = await self._shared.begin(caller.key_id, caller.limits, tokens=tokens, lease=lease)
                buckets = self._shared
            except Exception as error:
                self._lost(error)
        if buckets is self._own:
            decision = await self._own.begin(caller.key_id, caller.limits, tokens=tokens, lease=lease)
        headers = rate_limit_headers(decision)
        if (record := current_record()) is not None:
            record.headers.update(headers)
        if decision.refused:
            wait = decision.retry_after
            message = _MESSAGES[decision.refused].format(limits=caller.limits, wait=wait, tokens=tokens)
            raise ApiError(429, message, code="rate_limit_exceeded", retry_after=wait, headers=headers)
        ticket.buckets, ticket.lease, ticket.paid = buckets, lease, tokens

    def _lost(self, error: Exception) -> None:
        self._shared_again_at = time.monotonic() + _SHARED_RETRY_SECONDS
        log.error("Redis does not answer (%s); this server counts by itself until it does", type(error).__name__)

    async def _check_quota(self, key_id: str, quota: int) -> None:
        used = await self._ledger.tokens_this_month(key_id)
        if used < quota:
            return
        raise ApiError(
            429,
            f"this key has used {used:,} tokens of the {quota:,} it may use in a month; it starts anew on the first "
            "(UTC), and whoever gave you the key can raise it",
            code="insufficient_quota",
            retry_after=_seconds_left_in_month(self._clock()),
            headers={"x-should-retry": "false"},  # OpenAI's clients try again at once otherwise
        )


_MESSAGES = {
    "requests": "this key may make {limits.requests_per_minute} requests a minute; try again in {wait:.1f} s",
    "tokens": "this key may use {limits.tokens_per_minute} tokens a minute, prompts and answers together, and this "
    "prompt has {tokens}; try again in {wait:.1f} s",
    "concurrent": "this key may have {limits.concurrent_requests} requests running at a time; wait for one to end",
}


def rate_limit_headers(decision: Decision) -> dict[str, str]:
    """Return OpenAI's headers about the buckets that have a limit."""
    headers = {}
    for name, level in (("requests", decision.requests), ("tokens", decision.tokens)):
        if level is not None:
            headers[f"x-ratelimit-limit-{name}"] = str(level.limit)
            headers[f"x-ratelimit-remaining-{name}"] = str(level.remaining)
            headers[f"x-ratelimit-reset-{name}"] = f"{level.reset_seconds:.3f}s"
    return headers


def _seconds_left_in_month(now: float) -> float:
    today = datetime.fromtimestamp(now, timezone.utc)
    year, month = divmod(today.year * 12 + today.month, 12)
    return datetime(year, month + 1, 1, tzinfo=timezone.utc).timestamp() - now
