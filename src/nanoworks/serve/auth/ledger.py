"""Who used how much: a row for each key and day, and the month's sum for the quota."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from nanoworks.serve.auth import database as db
from nanoworks.serve.auth.keys import day

log = logging.getLogger("nanoworks")

_FRESH_SECONDS = 5.0  # how long a month's sum is believed; what is used here is added at once


@dataclass
class Usage:
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def add(self, other: Usage) -> None:
        self.requests += other.requests
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens


@dataclass
class _Month:
    """What a key used in a month: what the database said at `read_at`, and what came here since then."""

    month: str
    tokens: int
    read_at: float


class Ledger:
    """Collects usage in memory and writes it every `interval` seconds, so that no answer waits for a database.

    A server that is killed loses at most what came since the last writing. What cannot be written is kept and tried
    again. Several servers may share one database: each sees the others' usage within seconds.
    """

    def __init__(self, database: sa.Engine, *, interval: float = 1.0, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._interval = interval
        self._clock = clock
        self._unwritten: dict[tuple[str, str], Usage] = {}
        self._months: dict[str, _Month] = {}
        self._writing = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._write_regularly())

    async def close(self) -> None:
        """Write what is left."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self.flush()

    def add(self, key_id: str, used: Usage) -> None:
        self._unwritten.setdefault((key_id, day(self._clock())), Usage()).add(used)
        if (month := self._months.get(key_id)) is not None:
            month.tokens += used.tokens

    async def flush(self) -> None:
        """Write what was collected; after a failure it is kept, with a line in the log."""
        async with self._writing:
            await self._flush()

    async def tokens_this_month(self, key_id: str) -> int:
        """Return what a key used since the first of the month (UTC); what is known, while the database cannot say."""
        now = self._clock()
        month = day(now)[:7]
        known = self._months.get(key_id)
        if known is not None and known.month == month and abs(now - known.read_at) <= _FRESH_SECONDS:
            return known.tokens
        # Whoever leaves while we wait must not cut a writing short.
        return await asyncio.shield(self._read_month(key_id, month))

    async def _read_month(self, key_id: str, month: str) -> int:
        async with self._writing:  # so that nothing is on its way between here and the database
            await self._flush()
            try:
                tokens = await asyncio.to_thread(self.month_total, key_id, month)
            except Exception as error:
                log.error("usage cannot be read (%s)", type(error).__name__)
                known = self._months.get(key_id)
                if known is not None and known.month == month:
                    return known.tokens
                tokens = 0
            for (key, date), used in self._unwritten.items():
                if key == key_id and date.startswith(month):
                    tokens += used.tokens
            self._months[key_id] = _Month(month, tokens, self._clock())
            return tokens

    async def _flush(self) -> None:
        batch, self._unwritten = self._unwritten, {}
        if not batch:
            return
        try:
            await asyncio.to_thread(self._write, batch)
        except Exception as error:  # of whichever driver
            log.error("usage cannot be written (%s); it is kept and tried again", type(error).__name__)
            for entry, used in batch.items():
                self._unwritten.setdefault(entry, Usage()).add(used)

    def month_total(self, key_id: str, month: str) -> int:
        """Return the tokens that are written for a key in a month such as `2026-11`."""
        tokens = sa.func.coalesce(sa.func.sum(db.usage.c.prompt_tokens + db.usage.c.completion_tokens), 0)
        query = sa.select(tokens).where(db.usage.c.key_id == key_id, db.usage.c.day.startswith(month))
        with self._database.connect() as connection:
            return int(connection.execute(query).scalar_one())

    def totals(self, month: str) -> dict[str, Usage]:
        """Return what is written for each key in a month such as `2026-11`."""
        columns = (db.usage.c.requests, db.usage.c.prompt_tokens, db.usage.c.completion_tokens)
        query = (
            sa.select(db.usage.c.key_id, *(sa.func.sum(column) for column in columns))
            .where(db.usage.c.day.startswith(month))
            .group_by(db.usage.c.key_id)
        )
        with self._database.connect() as connection:
            return {row[0]: Usage(*map(int, row[1:])) for row in connection.execute(query)}

    async def _write_regularly(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            await asyncio.shield(self.flush())  # the end of this task must not cut it short

    def _write(self, batch: dict[tuple[str, str], Usage]) -> None:
        postgres = self._database.dialect.name == "postgresql"
        insert = (postgresql.insert if postgres else sqlite.insert)(db.usage)
        columns = ("requests", "prompt_tokens", "completion_tokens")
        upsert = insert.on_conflict_do_update(
            index_elements=["key_id", "day"],
            set_={column: db.usage.c[column] + insert.excluded[column] for column in columns},
        )
        # Sorted, so that two servers take the rows' locks in one order.
        rows = [{"key_id": key_id, "day": date, **vars(used)} for (key_id, date), used in sorted(batch.items())]
        with self._database.begin() as connection:
            connection.execute(upsert, rows)
