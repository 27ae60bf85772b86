"""Puts a server under a load and keeps what came of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from nanoworks.serve.bench.client import Client, Outcome
from nanoworks.serve.bench.load import Load, Question, questions
from nanoworks.serve.bench.scrape import Scraper, Snapshot


@dataclass
class Run:
    """A load and what came of it; times are seconds of `time.perf_counter`."""

    load: Load
    started: float
    ended: float
    asked: list[Question]
    outcomes: list[Outcome]
    """Of `asked`, in that order."""
    snapshots: list[Snapshot]

    @property
    def seconds(self) -> float:
        return self.ended - self.started


def run_load(load: Load, *, scrape_seconds: float = 0.25, progress: Callable[[], None] = lambda: None) -> Run:
    """Send the requests of `load` and wait for all answers, in an event loop of its own (uvloop's where there is one).

    Args:
        scrape_seconds: between two readings of the server's /metrics.
        progress: called after each answer.

    Raises:
        UserError: the server does not answer at all.
    """
    try:
        import uvloop
    except ImportError:
        return asyncio.run(_run(load, scrape_seconds, progress))
    return uvloop.run(_run(load, scrape_seconds, progress))


async def _run(load: Load, scrape_seconds: float, progress: Callable[[], None]) -> Run:
    client = Client(load)

    async def ask(question: Question) -> Outcome:
        outcome = await client.ask(question)
        progress()
        return outcome

    try:
        asked = questions(load, await client.calibrate())
        async with Scraper(load.url, load.headers, scrape_seconds) as scraper:
            started = time.perf_counter()
            if load.concurrency is not None:
                outcomes = await _by_places(asked, ask, load.concurrency)
            else:
                outcomes = await _by_rate(asked, ask)
            ended = time.perf_counter()
    finally:
        await client.close()
    return Run(load, started, ended, asked, outcomes, scraper.snapshots)


Ask = Callable[[Question], Awaitable[Outcome]]


async def _by_places(asked: list[Question], ask: Ask, places: int) -> list[Outcome]:
    """Keep `places` requests under way: as many users who ask again as soon as they are answered."""
    outcomes: list[Outcome | None] = [None] * len(asked)
    waiting = iter(enumerate(asked))

    async def user() -> None:
        for index, question in waiting:
            outcomes[index] = await ask(question)

    await asyncio.gather(*(user() for _ in range(min(places, len(asked)))))
    return [outcome for outcome in outcomes if outcome is not None]


async def _by_rate(asked: list[Question], ask: Ask) -> list[Outcome]:
    """Send each request when its time has come, whether or not others are answered."""
    start = time.perf_counter()

    async def later(question: Question) -> Outcome:
        await asyncio.sleep(max(0.0, start + question.at - time.perf_counter()))
        return await ask(question)

    return list(await asyncio.gather(*map(later, asked)))
