"""The same buckets in Redis, for several servers that share keys."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import redis.asyncio as redis

from nanoworks.serve.caller import Limits
from nanoworks.serve.limits.buckets import Decision, Kind, Level

# A script runs as one, so two servers never take the same token. It reads Redis's clock, which all servers share.
# KEYS: the buckets (hash), the leases (sorted by when they end). ARGV: now or '', requests and tokens a minute and
# concurrent requests or '' each, tokens wanted, lease, seconds a lease lasts without being renewed, 1 to begin.
_SCRIPT = """
local now = tonumber(ARGV[1])
if not now then
  local time = redis.call('TIME')
  now = time[1] + time[2] / 1000000
end
local limits = {tonumber(ARGV[2]), tonumber(ARGV[3])}
local wanted = {1, tonumber(ARGV[5])}
local concurrent, lease, lasts, begin = tonumber(ARGV[4]), ARGV[6], tonumber(ARGV[7]), ARGV[8] == '1'
local stored = redis.call('HMGET', KEYS[1], 'requests', 'tokens', 'at')
local minutes = math.max(0, now - (tonumber(stored[3]) or now)) / 60
local levels = {}
for i = 1, 2 do
  if limits[i] then
    levels[i] = math.min(limits[i], (tonumber(stored[i]) or limits[i]) + minutes * limits[i])
  end
end

local refused, wait = '', 0
if begin then
  redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
  if concurrent and redis.call('ZCARD', KEYS[2]) >= concurrent then
    refused, wait = 'concurrent', 1
  else
    for i = 1, 2 do
      if limits[i] and refused == '' then
        local seconds = (math.min(wanted[i], limits[i]) - levels[i]) * 60 / limits[i]
        if seconds > 0.000001 then
          refused, wait = i == 1 and 'requests' or 'tokens', seconds
        end
      end
    end
  end
else
  wanted[1] = 0
  redis.call('ZREM', KEYS[2], lease)
end

if refused == '' then
  local full = 0  -- seconds until both are; then a bucket is the same as none
  local fields = {'at', now}
  for i = 1, 2 do
    if limits[i] then
      levels[i] = levels[i] - wanted[i]
      fields[#fields + 1] = i == 1 and 'requests' or 'tokens'
      fields[#fields + 1] = levels[i]
      full = math.max(full, (limits[i] - levels[i]) * 60 / limits[i])
    end
  end
  if #fields > 2 then
    redis.call('HSET', KEYS[1], unpack(fields))
    redis.call('EXPIRE', KEYS[1], math.ceil(full) + 1)
  end
  if begin and concurrent then
    redis.call('ZADD', KEYS[2], now + lasts, lease)
    redis.call('EXPIRE', KEYS[2], math.ceil(lasts) + 1)
  end
end
return {refused, tostring(wait), tostring(levels[1] or ''), tostring(levels[2] or '')}
"""

_RENEW = """
local time = redis.call('TIME')
local ends = (tonumber(ARGV[1]) or (time[1] + time[2] / 1000000)) + ARGV[2]
redis.call('ZADD', KEYS[1], 'XX', ends, ARGV[3])  -- it may have ended meanwhile
redis.call('EXPIRE', KEYS[1], math.ceil(tonumber(ARGV[2])) + 1)
"""


class RedisBuckets:
    """Buckets in the Redis at `url` (redis://, rediss://, unix://).

    Args:
        lease_seconds: after so long the requests of a server that died no longer count as running.
        clock: seconds, for tests; None: Redis's own.
    """

    def __init__(
        self,
        url: str,
        *,
        lease_seconds: float = 30.0,
        clock: Callable[[], float] | None = None,
    ) -> None:
        # An answer must not hang on its limits, so a Redis that does not reply soon counts as gone.
        pool = redis.BlockingConnectionPool.from_url(
            url, max_connections=32, timeout=1, socket_timeout=1, socket_connect_timeout=1, decode_responses=True
        )
        self._redis = redis.Redis.from_pool(pool)
        self._script = self._redis.register_script(_SCRIPT)
        self._renewal = self._redis.register_script(_RENEW)
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._leases: dict[str, str] = {}
        self._renewing: asyncio.Task[None] | None = None

    async def begin(self, key: str, limits: Limits, *, tokens: int, lease: str) -> Decision:
        refused, wait, requests, of_tokens = await self._run(key, limits, tokens, lease, begin=True)
        if not refused and limits.concurrent_requests is not None:
            self._leases[lease] = key
            if self._renewing is None:
                self._renewing = asyncio.create_task(self._renew_regularly())
        kinds: dict[str, Kind | None] = {"": None, "requests": "requests", "tokens": "tokens"}
        return Decision(
            kinds.get(refused, "concurrent"),
            float(wait),
            _level(requests, limits.requests_per_minute),
            _level(of_tokens, limits.tokens_per_minute),
        )

    async def end(self, key: str, limits: Limits, *, tokens: int, lease: str) -> None:
        self._leases.pop(lease, None)
        await self._run(key, limits, tokens, lease, begin=False)

    async def close(self) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._renewing
        await self._redis.aclose()
        await self._redis.connection_pool.aclose()

    async def _run(self, key: str, limits: Limits, tokens: int, lease: str, *, begin: bool) -> list[str]:
        values = (
            self._now(),
            limits.requests_per_minute,
            limits.tokens_per_minute,
            limits.concurrent_requests,
            tokens,
            lease,
            self._lease_seconds,
            int(begin),
        )
        names = [self._name(key, "buckets"), self._name(key, "leases")]
        answer: Any = await self._script(keys=names, args=["" if value is None else value for value in values])
        return list(answer)

    async def _renew_regularly(self) -> None:
        while True:
            await asyncio.sleep(self._lease_seconds / 3)
            for lease, key in list(self._leases.items()):
                with contextlib.suppress(redis.RedisError):  # the next round tries again
                    args = [self._now() or "", self._lease_seconds, lease]
                    await self._renewal(keys=[self._name(key, "leases")], args=args)

    def _now(self) -> float | None:
        return None if self._clock is None else self._clock()

    def _name(self, key: str, what: str) -> str:
        return f"nanoworks:{{{key}}}:{what}"  # in braces: a cluster keeps both on one node


def _level(stored: str, limit: int | None) -> Level | None:
    if limit is None:
        return None
    level = float(stored)
    return Level(limit, max(0, int(level)), (limit - level) * 60 / limit)
