"""Knows whose key it is that a request carries, without asking the database each time."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from nanoworks.serve.auth.keys import Key, day, holds, read_key
from nanoworks.serve.auth.store import KeyStore
from nanoworks.serve.caller import Caller
from nanoworks.serve.errors import ApiError

log = logging.getLogger("nanoworks")

_PAUSE_SECONDS = 0.1  # between two readings: whoever guesses keys waits, and not the database

_CHALLENGE = {"WWW-Authenticate": "Bearer"}


class Guard:
    """Keeps all keys of `store` in memory and reads them anew every few seconds.

    So a key that is revoked elsewhere stops working after `max_age` seconds; a new one works at once. While
    the database cannot be read, the keys known last go on working for `max_outage` seconds.
    """

    def __init__(
        self,
        store: KeyStore,
        *,
        max_age: float = 2.0,
        max_outage: float = 60.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._max_age = max_age
        self._max_outage = max_outage
        self._clock = clock
        self._keys: dict[str, Key] = {}
        self._read_at = float("-inf")
        self._tried_at = float("-inf")
        self._reading = asyncio.Lock()

    async def caller(self, text: str | None) -> Caller:
        """Return who holds the key `text`.

        Raises:
            ApiError: 401 without a key, or with one that is wrong, expired or revoked; 503 while nobody can tell.
        """
        if not text:
            raise _refuse("this server needs a key; send it in the header `Authorization: Bearer KEY`")
        parts = read_key(text)
        if parts is None:
            raise _refuse("this is no key of this server; it looks like nw_..., and `nanoworks keys create` makes one")
        key_id, secret = parts
        arrival = self._clock()
        await self._read_since(arrival - self._max_age)
        if not holds(secret, self._keys.get(key_id), arrival):
            await self._read_since(arrival)  # it may have been created or rotated a moment ago
        if self._age(self._read_at) > self._max_age + self._max_outage:
            raise ApiError(503, "keys cannot be checked at the moment; try again later", retry_after=5)
        now = self._clock()
        key = self._keys.get(key_id)
        if not holds(secret, key, now) or key is None:
            raise _refuse("there is no such key; `nanoworks keys list` shows which there are")
        # Only its holder learns what became of a key.
        status = key.status(now)
        if status == "revoked":
            raise _refuse(f"the key {key.id} was revoked; ask for a new one")
        if status == "expired":
            raise _refuse(f"the key {key.id} expired on {day(key.expires_at or 0)} (UTC); ask for a new one")
        return key.caller()

    async def refresh(self) -> None:
        """Read the keys now: what changed holds from the next request on."""
        async with self._reading:
            await self._read()

    async def _read_since(self, moment: float) -> None:
        """Make sure that the keys were read, or tried to be, after `moment`; not more often than ten times a second."""
        if self._is_since(moment):
            return
        async with self._reading:
            if self._is_since(moment):
                return  # somebody read them while we waited
            await asyncio.sleep(max(0.0, _PAUSE_SECONDS - self._age(self._tried_at)))
            await self._read()

    def _is_since(self, moment: float) -> bool:
        return moment <= self._tried_at <= self._clock()  # a clock that was set back must not keep old keys alive

    async def _read(self) -> None:
        started = self._clock()
        try:
            self._keys = {key.id: key for key in await asyncio.to_thread(self._store.all_keys)}
            self._read_at = started
        except Exception as error:  # of whichever driver
            log.error("the database of keys cannot be read (%s)", type(error).__name__)
        self._tried_at = started

    def _age(self, moment: float) -> float:
        return abs(self._clock() - moment)


def _refuse(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers=_CHALLENGE)
