from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import datetime, timezone

import pytest
import sqlalchemy as sa

from nanoworks.serve.auth.database import open_database
from nanoworks.serve.auth.ledger import Ledger, Usage

NOVEMBER = datetime(2026, 11, 30, 23, 0, tzinfo=timezone.utc).timestamp()


class Clock:
    now = NOVEMBER

    def __call__(self) -> float:
        return self.now


class FailingLedger(Ledger):
    broken = False

    def _write(self, batch: dict[tuple[str, str], Usage]) -> None:
        if self.broken:
            raise OSError("the disk is full")
        super()._write(batch)

    def month_total(self, key_id: str, month: str) -> int:
        if self.broken:
            raise OSError("the database is gone")
        return super().month_total(key_id, month)


@pytest.fixture
def database(keys_db: str) -> Iterator[sa.Engine]:
    engine = open_database(keys_db)
    yield engine
    engine.dispose()


def test_usage_adds_up_over_days_and_months(database: sa.Engine) -> None:
    async def run() -> None:
        clock = Clock()
        ledger = Ledger(database, clock=clock)
        ledger.add("alice", Usage(1, 10, 5))
        ledger.add("bob", Usage(1, 1, 1))
        await ledger.flush()
        ledger.add("alice", Usage(1, 100, 50))
        assert await ledger.tokens_this_month("alice") == 165
        clock.now += 2 * 3600
        assert await ledger.tokens_this_month("alice") == 0, "a new month"
        ledger.add("alice", Usage(2, 7, 0))
        assert await ledger.tokens_this_month("alice") == 7
        await ledger.close()
        assert ledger.totals("2026-11") == {"alice": Usage(2, 110, 55), "bob": Usage(1, 1, 1)}
        assert ledger.totals("2026-12") == {"alice": Usage(2, 7, 0)}

    asyncio.run(run())


def test_two_servers_lose_nothing_and_see_each_other(database: sa.Engine) -> None:
    async def run() -> None:
        clock = Clock()
        ledgers = [Ledger(database, clock=clock) for _ in range(2)]
        for ledger in ledgers:
            assert await ledger.tokens_this_month("alice") == 0

        async def use(ledger: Ledger) -> None:
            for _ in range(20):
                ledger.add("alice", Usage(1, 2, 3))
                await ledger.flush()

        await asyncio.gather(*(use(ledger) for ledger in ledgers))
        assert await ledgers[0].tokens_this_month("alice") == 100, "its own, until it asks again"
        clock.now += 10
        assert [await ledger.tokens_this_month("alice") for ledger in ledgers] == [200, 200]
        assert ledgers[0].totals("2026-11") == {"alice": Usage(40, 80, 120)}

    asyncio.run(run())


def test_what_comes_during_a_writing_is_counted_once(database: sa.Engine) -> None:
    async def run() -> None:
        ledger = Ledger(database, clock=Clock())

        async def use() -> None:
            for _ in range(200):
                ledger.add("alice", Usage(1, 1, 0))
                await asyncio.sleep(0)

        await asyncio.gather(use(), *(ledger.flush() for _ in range(10)), ledger.tokens_this_month("alice"))
        assert await ledger.tokens_this_month("alice") == 200
        await ledger.close()
        assert ledger.totals("2026-11") == {"alice": Usage(200, 200, 0)}

    asyncio.run(run())


def test_what_cannot_be_written_is_kept(database: sa.Engine, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        ledger = FailingLedger(database, interval=0.01, clock=Clock())
        ledger.start()
        ledger.broken = True
        ledger.add("alice", Usage(1, 2, 3))
        while "cannot be written" not in caplog.text:
            await asyncio.sleep(0.01)
        ledger.add("alice", Usage(1, 20, 30))
        assert await ledger.tokens_this_month("alice") == 55, "what it knows itself"
        ledger.broken = False
        while not ledger.totals("2026-11"):
            await asyncio.sleep(0.01)
        await ledger.close()
        assert ledger.totals("2026-11") == {"alice": Usage(2, 22, 33)}

    asyncio.run(run())
