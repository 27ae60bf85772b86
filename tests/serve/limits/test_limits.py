"""Limits and quotas over HTTP: SQLite and memory, and PostgreSQL and Redis, hold the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import redis

from nanoworks.engine import Engine
from nanoworks.serve.auth.database import open_database
from nanoworks.serve.auth.keys import day
from nanoworks.serve.auth.ledger import Ledger, Usage
from nanoworks.serve.auth.store import KeyStore
from nanoworks.serve.caller import Limits
from nanoworks.serve.settings import ServerSettings
from tests.serve.services import empty_database, running_redis

Serve = Callable[..., AbstractContextManager[str]]


@dataclass
class Service:
    """A server and its keys."""

    url: str
    store: KeyStore
    ledger: Ledger

    def key(self, **limits: int) -> str:
        return self.store.create("alice", limits=Limits(**limits))

    def post(self, key: str, path: str = "chat/completions", *, url: str = "", **body: Any) -> httpx.Response:
        default = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2} if "chat" in path else {}
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.post(f"{url or self.url}/v1/{path}", json=default | body, headers=headers, timeout=60)

    def used(self, key: str) -> Usage:
        return self.ledger.totals(day(time.time())[:7]).get(key[3:15], Usage())

    def used_becomes(self, key: str, expected: Callable[[Usage], bool]) -> Usage:
        """Wait for the server to write it down."""
        for _ in range(1000):
            if expected(used := self.used(key)):
                return used
            time.sleep(0.02)
        raise AssertionError(f"it stays {used}")


@contextmanager
def started(serve: Serve, engine: Engine, settings: ServerSettings) -> Iterator[Service]:
    assert settings.keys_db is not None
    database = open_database(settings.keys_db)
    try:
        with serve(engine, settings) as url:
            yield Service(url, KeyStore(database), Ledger(database))
    finally:
        database.dispose()


@pytest.fixture(scope="module", params=["sqlite and memory", "postgres and redis"])
def service(
    request: pytest.FixtureRequest, serve: Serve, endless_engine: Engine, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """One for all tests of this file: each makes keys of its own."""
    with ExitStack() as stack:
        if request.param == "sqlite and memory":
            settings = ServerSettings(auth=True, keys_db=str(tmp_path_factory.mktemp("keys") / "keys.db"))
        else:
            keys_db = stack.enter_context(empty_database(request.getfixturevalue("postgres_server")))
            settings = ServerSettings(auth=True, keys_db=keys_db, redis_url=request.getfixturevalue("redis_server"))
        yield stack.enter_context(started(serve, endless_engine, settings))


def test_requests_a_minute(service: Service) -> None:
    key, other = service.key(requests_per_minute=2, tokens_per_minute=100_000), service.key()
    first = service.post(key)
    assert first.status_code == 200
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["x-ratelimit-limit-tokens"] == "100000"
    assert float(first.headers["x-ratelimit-reset-requests"].removesuffix("s")) == pytest.approx(30, abs=0.1)
    streamed = service.post(key, stream=True)
    assert streamed.headers["x-ratelimit-remaining-requests"] == "0"
    refused = service.post(key, stream=True)  # which gets a status too, not an event
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert "2 requests a minute" in error["message"]
    assert service.post(other).status_code == 200, "another key is not concerned"
    with (
        openai.OpenAI(base_url=f"{service.url}/v1", api_key=key, max_retries=0) as client,
        pytest.raises(openai.RateLimitError),
    ):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}])


def test_tokens_a_minute_count_the_answer(service: Service) -> None:
    key = service.key(tokens_per_minute=200)
    assert service.post(key, max_tokens=400).status_code == 200
    refused = service.post(key)
    assert refused.status_code == 429
    assert "200 tokens a minute" in refused.json()["error"]["message"]
    assert int(refused.headers["retry-after"]) > 60, "there is a debt to pay"


def test_requests_at_a_time(service: Service) -> None:
    key = service.key(concurrent_requests=2)
    headers = {"Authorization": f"Bearer {key}"}
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
    with httpx.Client(base_url=service.url, headers=headers, timeout=60) as client, ExitStack() as streams:
        for _ in range(2):
            response = streams.enter_context(client.stream("POST", "/v1/chat/completions", json=body))
            assert response.status_code == 200
        refused = service.post(key)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert "2 requests running" in refused.json()["error"]["message"]
        streams.close()  # who leaves makes room
        assert any(service.post(key).status_code == 200 for _ in range(500))


def test_the_prompts_of_one_request_are_one_request(service: Service) -> None:
    key = service.key(requests_per_minute=2, concurrent_requests=1, tokens_per_minute=10_000)
    prompts = ["one", "two", "three", "four"]
    answers = [
        service.post(key, "completions", prompt=prompts, max_tokens=3),
        service.post(key, "embeddings", input=prompts, model="tiny"),
    ]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert service.post(key, "embeddings", input=prompts, model="tiny").status_code == 429
    used = service.used_becomes(key, lambda used: used.requests == 2)
    assert used.prompt_tokens > 30
    assert used.tokens == sum(answer.json()["usage"]["total_tokens"] for answer in answers)


def test_the_quota_of_a_month(service: Service) -> None:
    key = service.key(tokens_per_month=60)
    last = [service.post(key, max_tokens=20) for _ in range(5)][-1]
    assert last.status_code == 429
    assert last.json()["error"]["code"] == "insufficient_quota"
    assert "of the 60 it may use in a month" in last.json()["error"]["message"]
    assert last.headers["x-should-retry"] == "false"
    assert 0 < int(last.headers["retry-after"]) <= 31 * 24 * 3600
    service.used_becomes(key, lambda used: used.tokens >= 60)
    service.store.set_limits(key[3:15], Limits(tokens_per_month=10_000))
    assert any(service.post(key).status_code == 200 for _ in range(1000)), "raised while it runs"


def test_who_leaves_pays_for_what_was_computed(service: Service) -> None:
    key = service.key(tokens_per_minute=20_000)
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.stream("POST", f"{service.url}/v1/chat/completions", json=body, headers=headers, timeout=60) as response:
        for _, _ in zip(response.iter_lines(), range(20), strict=False):
            pass
    used = service.used_becomes(key, lambda used: used.requests == 1)
    assert 5 <= used.completion_tokens < 20_000


def test_what_is_refused_costs_nothing(service: Service) -> None:
    key = service.key(tokens_per_minute=500, requests_per_minute=100)
    for body in ({"messages": []}, {"temperature": -1}, {"model": "other"}, {"n": 10**9}):
        assert service.post(key, **body).status_code in (400, 404)
    answer = service.post(key)
    assert answer.headers["x-ratelimit-remaining-requests"] == "99"
    used = service.used_becomes(key, lambda used: used.requests > 0)
    assert used.tokens == answer.json()["usage"]["total_tokens"]


def test_servers_share_limits_and_quotas(
    serve: Serve, make_engine: Callable[..., Engine], postgres_url: str, redis_url: str
) -> None:
    settings = ServerSettings(auth=True, keys_db=postgres_url, redis_url=redis_url)
    with (
        started(serve, make_engine(context=128), settings) as one,
        started(serve, make_engine(context=128), settings) as two,
    ):
        key = one.key(requests_per_minute=10)
        urls = [one.url, two.url] * 15
        with ThreadPoolExecutor(8) as pool:
            statuses = list(pool.map(lambda url: one.post(key, url=url).status_code, urls))
        assert statuses.count(200) in (10, 11), "one may have come back meanwhile"
        assert statuses.count(429) == 30 - statuses.count(200)
        used = one.used_becomes(key, lambda used: used.requests == statuses.count(200))
        assert used.prompt_tokens > 0


def test_when_redis_dies_each_server_counts_by_itself(
    serve: Serve,
    make_engine: Callable[..., Engine],
    tmp_path: Path,
    free_port: int,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nanoworks.serve.limits.limiter._SHARED_RETRY_SECONDS", 0.2)
    settings = ServerSettings(auth=True, keys_db=str(tmp_path / "keys.db"), redis_url=f"redis://127.0.0.1:{free_port}")
    with started(serve, make_engine(context=128), settings) as service:
        with running_redis(free_port) as url:
            key = service.key(requests_per_minute=3)
            assert service.post(key).status_code == 200
            with redis.Redis.from_url(url) as client:
                assert client.keys() == [f"nanoworks:{{{key[3:15]}}}:buckets".encode()]
        statuses = [service.post(key).status_code for _ in range(5)]
        assert statuses == [200, 200, 200, 429, 429]
        assert "Redis does not answer (ConnectionError)" in caplog.text
        with running_redis(free_port) as url, redis.Redis.from_url(url) as client:
            assert any(service.post(key).status_code == 200 and client.keys() for _ in range(3000)), "it comes back"
