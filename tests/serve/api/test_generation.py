"""Where a request meets the engine: who is asked, who is told, and that nobody is told twice or not at all."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from nanoworks.engine import AsyncEngine, Delta, Engine
from nanoworks.serve.app import create_app
from nanoworks.serve.caller import ANONYMOUS
from nanoworks.serve.errors import ApiError
from nanoworks.serve.generation import Generation, together
from nanoworks.serve.observer import Observer
from nanoworks.serve.server import Server, listen

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}


class Watcher(Observer):
    """Writes down what it sees. `refuse`: admits nobody. `finished` takes its time, as a database would."""

    def __init__(self) -> None:
        self.refuse = False
        self.admitted: list[Generation] = []
        self.tokens: list[int] = []
        self.ended: list[Generation] = []

    async def admit(self, job: Generation) -> None:
        if self.refuse:
            raise ApiError(429, "too many; slow down", code="rate_limit_exceeded", retry_after=2.5)
        self.admitted.append(job)

    def delta(self, job: Generation, delta: Delta) -> None:
        self.tokens += delta.token_ids

    async def finished(self, job: Generation) -> None:
        await asyncio.sleep(0.05)
        self.ended.append(job)


@pytest.fixture
def watched(endless_engine: Engine) -> Iterator[tuple[str, Watcher, Watcher]]:
    """A server with two observers, the first and the last of them all."""
    first, last = Watcher(), Watcher()
    app = create_app(AsyncEngine(endless_engine), name="tiny")
    observers = app.state.server.observers
    observers[:] = [first, *observers, last]
    with listen("127.0.0.1", 0) as sock:
        server = Server(app, announcement="ready")
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}", first, last
        finally:
            server.should_exit = True
            thread.join(timeout=60)


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_seen_from_its_beginning_to_its_end(watched: Any, stream: bool) -> None:
    url, first, last = watched
    httpx.post(f"{url}/v1/chat/completions", json={**CHAT, "stream": stream}).raise_for_status()
    for watcher in (first, last):
        wait_for(lambda watcher=watcher: watcher.ended)
        assert watcher.admitted == watcher.ended
        [job] = watcher.ended
        assert (job.endpoint, job.prompt_tokens, job.completion_tokens) == ("/v1/chat/completions", 6, 5)
        assert (job.finish_reasons, job.error, len(watcher.tokens)) == (["length"], None, 5)
        assert job.queue_seconds is not None
        assert job.queue_seconds >= 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_is_a_status_and_those_before_it_are_told(watched: Any, stream: bool) -> None:
    url, first, last = watched
    last.refuse = True
    response = httpx.post(f"{url}/v1/chat/completions", json={**CHAT, "stream": stream})
    assert (response.status_code, response.headers["retry-after"]) == (429, "3")
    assert response.json()["error"]["type"] == "rate_limit_error"
    wait_for(lambda: first.ended)
    assert (len(first.admitted), len(first.ended), first.ended[0].error.status) == (1, 1, 429)
    assert not last.ended


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_still_counted_once(watched: Any, endless_engine: Engine, stream: bool) -> None:
    url, first, last = watched
    body = {**CHAT, "max_tokens": None, "stream": stream}
    if stream:
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response:
            next(response.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/chat/completions", json=body, timeout=httpx.Timeout(60, read=0.3))
    wait_for(lambda: first.ended and last.ended and not endless_engine.has_work)
    time.sleep(0.1)
    assert len(first.ended) == len(last.ended) == 1
    assert first.ended[0].completion_tokens > 0
    assert first.ended[0].finish_reasons == []


def test_an_observer_that_fails_at_the_end_hides_nothing_from_the_others(
    watched: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    url, first, last = watched

    async def fail(job: Generation) -> None:
        raise OSError("the store is away")

    monkeypatch.setattr(first, "finished", fail)
    assert httpx.post(f"{url}/v1/chat/completions", json=CHAT).json()["choices"]
    wait_for(lambda: last.ended)
    assert "the store is away" in caplog.text


def test_every_prompt_of_a_list_is_a_generation(watched: Any) -> None:
    url, first, _ = watched
    httpx.post(f"{url}/v1/completions", json={"prompt": ["a", "b", "c"], "max_tokens": 3}).raise_for_status()
    wait_for(lambda: len(first.ended) == 3)
    assert {job.endpoint for job in first.ended} == {"/v1/completions"}


def test_embeddings_are_seen_too(watched: Any) -> None:
    url, first, _ = watched
    httpx.post(f"{url}/v1/embeddings", json={"input": "abc"}).raise_for_status()
    wait_for(lambda: first.ended)
    assert (first.ended[0].endpoint, first.ended[0].prompt_tokens, first.ended[0].completion_tokens) == (
        "/v1/embeddings",
        4,
        0,
    )


def test_many_clients_that_leave_at_once(watched: Any, endless_engine: Engine) -> None:
    """Forty streams cut at random moments: each is counted once, and the engine holds nothing any more."""
    url, first, last = watched

    def visit(i: int) -> None:
        body = {**CHAT, "max_tokens": None, "stream": i % 2 == 0}
        timeout = httpx.Timeout(60, read=0.01 * (i % 7 + 1))
        try:
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=timeout) as response:
                for count, _ in enumerate(response.iter_lines()):
                    if count > i:
                        break
        except httpx.TimeoutException:
            pass

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(visit, range(40)))
    wait_for(lambda: not endless_engine.has_work and len(last.ended) == len(last.admitted))
    assert sorted(job.request_id for job in first.ended) == sorted(job.request_id for job in first.admitted)
    assert len({job.request_id for job in first.ended}) == len(first.ended)
    stats = endless_engine.stats()
    assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)


def test_together_ends_the_others_when_one_fails() -> None:
    closed: list[str] = []

    class Job:
        def __init__(self, name: str) -> None:
            self.name = name

        async def deltas(self) -> Any:
            try:
                for i in range(1000):
                    await asyncio.sleep(0)
                    if self.name == "bad" and i == 3:
                        raise ApiError(400, "no")
                    yield Delta(self.name, 0, text=str(i))
            finally:
                closed.append(self.name)

    async def read() -> None:
        jobs: Any = [Job("good"), Job("bad"), Job("other")]
        async for _ in together(jobs):
            pass

    with pytest.raises(ApiError, match="no"):
        asyncio.run(read())
    assert sorted(closed) == ["bad", "good", "other"]


def test_only_admins_go_before_others(random_engine: Engine) -> None:
    engine = AsyncEngine(random_engine)
    try:
        app = create_app(engine, name="tiny")
        state = app.state.server
        from nanoworks.engine import SamplingParams

        Generation(state, ANONYMOUS, "/", [1], SamplingParams(), priority=5)  # no keys: everybody may
        state.guard = object()
        Generation(state, ANONYMOUS, "/", [1], SamplingParams(), priority=-5)
        with pytest.raises(ApiError, match="only an admin's key"):
            Generation(state, ANONYMOUS, "/", [1], SamplingParams(), priority=5)
    finally:
        engine.shutdown()
