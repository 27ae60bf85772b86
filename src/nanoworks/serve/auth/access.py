"""Everything that keys need while a server runs: who may call, how much, and what was used."""

from __future__ import annotations

import sqlalchemy as sa

from nanoworks.common.errors import UserError, missing_extra
from nanoworks.serve.auth.database import default_url, open_database
from nanoworks.serve.auth.guard import Guard
from nanoworks.serve.auth.ledger import Ledger
from nanoworks.serve.auth.store import KeyStore
from nanoworks.serve.limits.buckets import Buckets
from nanoworks.serve.limits.limiter import Limiter


class Access:
    """Open while the server runs: `async with Access(...)`.

    Args:
        keys_db: a file's path or a URL, as in `open_database`; None: the user's own file.
        redis_url: of the buckets that several servers share; None: each server counts by itself.

    Raises:
        UserError: the database cannot be used, or the URL is none.
    """

    def __init__(self, *, keys_db: str | None = None, redis_url: str | None = None) -> None:
        self._database: sa.Engine = open_database(keys_db or default_url())
        self.guard = Guard(KeyStore(self._database))
        self._ledger = Ledger(self._database)
        self.limiter = Limiter(self._ledger, shared=None if redis_url is None else _redis(redis_url))

    async def __aenter__(self) -> Access:
        self._ledger.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._ledger.close()
        await self.limiter.close()
        self._database.dispose()


def _redis(url: str) -> Buckets:
    try:
        from nanoworks.serve.limits.redis_buckets import RedisBuckets
    except ImportError:
        raise missing_extra("redis", "server") from None
    try:
        return RedisBuckets(url)
    except ValueError:  # its message would repeat the password
        raise UserError("this is no Redis URL; give redis://HOST:6379/0, or rediss:// for TLS") from None
