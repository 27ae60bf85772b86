"""One behaviour, two places: in this process, and in a Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import redis

from nanoworks.serve.caller import Limits
from nanoworks.serve.limits.buckets import Buckets, Decision, Level, MemoryBuckets
from nanoworks.serve.limits.redis_buckets import RedisBuckets


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """Buckets under a clock of ours, closed at the end: `bench.run(test)`."""

    def __init__(self, redis_url: str | None) -> None:
        self.clock = Clock()
        self.redis_url = redis_url
        self._leases = 0

    def run(self, test: Callable[[Buckets], Awaitable[None]]) -> None:
        async def run() -> None:
            async with self.buckets() as buckets:
                await test(buckets)

        asyncio.run(run())

    @asynccontextmanager
    async def buckets(self) -> AsyncIterator[Buckets]:
        if self.redis_url is None:
            yield MemoryBuckets(clock=self.clock)
            return
        buckets = RedisBuckets(self.redis_url, clock=self.clock)
        yield buckets
        await buckets.close()

    async def ask(self, buckets: Buckets, limits: Limits, *, tokens: int = 0, key: str = "alice") -> Decision:
        self._leases += 1
        return await buckets.begin(key, limits, tokens=tokens, lease=f"lease-{self._leases}")


@pytest.fixture(params=["memory", "redis"])
def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(request.getfixturevalue("redis_url") if request.param == "redis" else None)


def test_requests_a_minute(bench: Bench) -> None:
    async def test(buckets: Buckets) -> None:
        limits = Limits(requests_per_minute=3)
        levels = [await bench.ask(buckets, limits) for _ in range(3)]
        assert [decision.refused for decision in levels] == [None] * 3
        assert [decision.requests and decision.requests.remaining for decision in levels] == [2, 1, 0]
        assert levels[0].tokens is None
        refused = await bench.ask(buckets, limits)
        assert (refused.refused, refused.retry_after) == ("requests", pytest.approx(20))
        assert refused.requests == Level(3, 0, pytest.approx(60))
        bench.clock.now += 19.9
        assert (await bench.ask(buckets, limits)).retry_after == pytest.approx(0.1)
        bench.clock.now += 0.1
        assert (await bench.ask(buckets, limits)).refused is None
        assert (await bench.ask(buckets, limits)).refused == "requests"
        bench.clock.now += 3600
        assert (await bench.ask(buckets, limits)).requests == Level(3, 2, pytest.approx(20)), "it never overflows"

    bench.run(test)


def test_each_key_has_its_own(bench: Bench) -> None:
    async def test(buckets: Buckets) -> None:
        limits = Limits(requests_per_minute=1)
        assert (await bench.ask(buckets, limits, key="alice")).refused is None
        assert (await bench.ask(buckets, limits, key="bob")).refused is None
        assert (await bench.ask(buckets, limits, key="bob")).refused == "requests"

    bench.run(test)


def test_tokens_are_paid_when_they_are_known(bench: Bench) -> None:
    async def test(buckets: Buckets) -> None:
        limits = Limits(tokens_per_minute=600)  # ten a second
        first = await buckets.begin("alice", limits, tokens=100, lease="first")
        assert first.tokens == Level(600, 500, pytest.approx(10))
        await buckets.end("alice", limits, tokens=650, lease="first")
        refused = await bench.ask(buckets, limits, tokens=50)
        assert (refused.refused, refused.retry_after) == ("tokens", pytest.approx(20)), "a debt of 150, and 50"
        assert refused.tokens == Level(600, 0, pytest.approx(75))
        bench.clock.now += 20
        assert (await bench.ask(buckets, limits, tokens=50)).refused is None
        await buckets.end("alice", limits, tokens=-50, lease="second")
        assert (await bench.ask(buckets, limits, tokens=50)).refused is None, "what was not used comes back"

    bench.run(test)


def test_a_prompt_longer_than_the_bucket_waits_for_a_full_one(bench: Bench) -> None:
    async def test(buckets: Buckets) -> None:
        limits = Limits(tokens_per_minute=60)
        assert (await bench.ask(buckets, limits, tokens=180)).refused is None
        assert (await bench.ask(buckets, limits, tokens=180)).retry_after == pytest.approx(180)
        bench.clock.now += 180
        assert (await bench.ask(buckets, limits, tokens=180)).refused is None

    bench.run(test)


def test_who_is_refused_pays_nothing(bench: Bench) -> None:
    async def test(buckets: Buckets) -> None:
        limits = Limits(requests_per_minute=2, tokens_per_minute=100)
        assert (await bench.ask(buckets, limits, tokens=90)).refused is None
        for _ in range(5):
            refused = await bench.ask(buckets, limits, tokens=20)
            assert refused.refused == "tokens"
            assert refused.requests == Level(2, 1, pytest.approx(30))
        assert (await bench.ask(buckets, limits, tokens=10)).refused is None

    bench.run(test)


def test_requests_at_a_time(bench: Bench) -> None:
    async def test(buckets: Buckets) -> None:
        limits = Limits(concurrent_requests=2)
        for lease in ("a", "b"):
            assert (await buckets.begin("alice", limits, tokens=1, lease=lease)).refused is None
        assert await buckets.begin("alice", limits, tokens=1, lease="c") == Decision("concurrent", 1)
        await buckets.end("alice", limits, tokens=0, lease="a")
        await buckets.end("alice", limits, tokens=0, lease="a")
        assert (await buckets.begin("alice", limits, tokens=1, lease="c")).refused is None
        assert (await buckets.begin("alice", limits, tokens=1, lease="d")).refused == "concurrent"

    bench.run(test)


def test_a_crowd_gets_no_more_than_there_is(bench: Bench) -> None:
    async def test(buckets: Buckets) -> None:
        limits = Limits(requests_per_minute=20, concurrent_requests=15)
        async with bench.buckets() as other:
            # Two servers, if they share a Redis; in memory each has its own.
            both = [buckets, other] if bench.redis_url else [buckets]
            asked = [bench.ask(both[i % len(both)], limits) for i in range(100)]
            decisions = await asyncio.gather(*asked)
        assert [decision.refused for decision in decisions].count(None) == 15

    bench.run(test)


def test_limits_may_change_and_come_and_go(bench: Bench) -> None:
    async def test(buckets: Buckets) -> None:
        for _ in range(5):
            assert await buckets.begin("alice", Limits(), tokens=10**9, lease="a") == Decision()
            await buckets.end("alice", Limits(), tokens=10**9, lease="a")
        assert (await bench.ask(buckets, Limits(tokens_per_minute=100), tokens=60)).refused is None, "no old debts"
        assert (await bench.ask(buckets, Limits(tokens_per_minute=20), tokens=30)).refused is None, "cut to 20: full"
        assert (await bench.ask(buckets, Limits(tokens_per_minute=100), tokens=30)).refused == "tokens"

    bench.run(test)


def test_over_time_nobody_gets_more_than_the_rate(bench: Bench) -> None:
    async def test(buckets: Buckets) -> None:
        limits = Limits(requests_per_minute=6, tokens_per_minute=600)
        used = requests = 0
        for second in range(600):
            bench.clock.now += 1
            lease = f"at-{second}"
            if (await buckets.begin("alice", limits, tokens=40, lease=lease)).refused is None:
                requests += 1
                used += 40 + (answer := second % 120)
                await buckets.end("alice", limits, tokens=answer, lease=lease)
        assert requests <= 6 + 60
        assert 5000 < used <= 600 + 6000 + 160

    bench.run(test)


def test_the_requests_of_a_server_that_died_are_forgotten(redis_url: str) -> None:
    async def run() -> None:
        clock = Clock()
        limits = Limits(concurrent_requests=1)
        dies = RedisBuckets(redis_url, lease_seconds=30, clock=clock)
        lives = RedisBuckets(redis_url, lease_seconds=30, clock=clock)
        assert (await dies.begin("alice", limits, tokens=0, lease="a")).refused is None
        await dies.close()
        clock.now += 29
        assert (await lives.begin("alice", limits, tokens=0, lease="b")).refused == "concurrent"
        clock.now += 2
        assert (await lives.begin("alice", limits, tokens=0, lease="b")).refused is None
        await lives.close()

    asyncio.run(run())


def test_a_long_request_keeps_its_place(redis_url: str) -> None:
    async def run() -> None:
        clock = Clock()
        limits = Limits(concurrent_requests=1)
        buckets = RedisBuckets(redis_url, lease_seconds=0.3, clock=clock)
        assert (await buckets.begin("alice", limits, tokens=0, lease="a")).refused is None
        with redis.Redis.from_url(redis_url) as client:
            for _ in range(3):
                clock.now += 0.25
                while client.zscore("nanoworks:{alice}:leases", "a") < clock.now + 0.2:
                    await asyncio.sleep(0.02)  # it is renewed in the background
        assert (await buckets.begin("alice", limits, tokens=0, lease="b")).refused == "concurrent"
        await buckets.end("alice", limits, tokens=0, lease="a")
        assert (await buckets.begin("alice", limits, tokens=0, lease="b")).refused is None
        await buckets.close()

    asyncio.run(run())


def test_a_bucket_that_is_full_again_leaves_nothing_in_redis(redis_url: str) -> None:
    async def run() -> None:
        buckets = RedisBuckets(redis_url)
        limits = Limits(requests_per_minute=6000, tokens_per_minute=60_000, concurrent_requests=5)
        await buckets.begin("alice", limits, tokens=6000, lease="a")
        await buckets.end("alice", limits, tokens=0, lease="a")
        with redis.Redis.from_url(redis_url) as client:
            (name,) = client.keys()
            assert name == b"nanoworks:{alice}:buckets"
            assert 0 < client.ttl(name) <= 8
        await buckets.close()

    asyncio.run(run())
