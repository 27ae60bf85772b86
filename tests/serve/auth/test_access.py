"""Keys over HTTP, with each kind of database: who gets in, and that no key is left lying about."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from fastapi import FastAPI

from nanoworks.common.errors import UserError
from nanoworks.engine import AsyncEngine, Engine
from nanoworks.serve.app import create_app
from nanoworks.serve.auth.database import open_database
from nanoworks.serve.auth.keys import day, new_secret, write_key
from nanoworks.serve.auth.ledger import Ledger, Usage
from nanoworks.serve.auth.store import KeyStore
from nanoworks.serve.settings import ServerSettings
from tests.serve.services import empty_database

Serve = Callable[..., AbstractContextManager[str]]

# Everything else needs a key. The page's own files are the same for everybody, and it is the page that asks for a key.
PROBES = {"/live", "/ready", "/health"}
OPEN = PROBES | {"/", "/ui/x"}
CHAT = {"messages": [{"role": "user", "content": "the prompt of a stranger"}], "max_tokens": 4}


@dataclass
class Keyed:
    url: str
    store: KeyStore
    ledger: Ledger
    log: Path

    def chat(self, key: str | None, **extra: Any) -> httpx.Response:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.post(f"{self.url}/v1/chat/completions", json=CHAT | extra, headers=headers, timeout=60)


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def keyed(
    request: pytest.FixtureRequest, serve: Serve, random_engine: Engine, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Keyed]:
    """One server for all tests of this file: each makes keys of its own."""
    folder = tmp_path_factory.mktemp("keyed")
    with ExitStack() as stack:
        keys_db = str(folder / "keys.db")
        if request.param == "postgres":
            keys_db = stack.enter_context(empty_database(request.getfixturevalue("postgres_server")))
        database = open_database(keys_db)
        stack.callback(database.dispose)
        settings = ServerSettings(auth=True, keys_db=keys_db, access_log=str(folder / "access.log"))
        url = stack.enter_context(serve(random_engine, settings))
        yield Keyed(url, KeyStore(database), Ledger(database), folder / "access.log")


@pytest.fixture(scope="module")
def guarded_app(make_engine: Callable[..., Engine], tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    path = tmp_path_factory.mktemp("keys") / "keys.db"
    engine = AsyncEngine(make_engine(context=128))
    yield create_app(engine, name="tiny", settings=ServerSettings(auth=True, keys_db=str(path)))
    engine.shutdown()


def routes_of(routes: Any) -> Iterator[tuple[str, set[str]]]:
    """Every path of an app and its methods, of included routers and mounted folders too."""
    for route in routes:
        if hasattr(route, "original_router"):
            yield from routes_of(route.original_router.routes)
        elif hasattr(route, "methods"):
            yield route.path, set(route.methods)
        else:
            yield route.path + "/x", {"GET"}


def test_no_route_but_the_open_ones_answers_without_a_key(guarded_app: FastAPI) -> None:
    async def run() -> None:
        found = {path.replace(":path}", "}"): methods for path, methods in routes_of(guarded_app.routes)}
        assert set(guarded_app.openapi()["paths"]) <= set(found)
        assert {"/v1/chat/completions", "/v1/models", "/metrics", "/openapi.json"} <= set(found) - OPEN
        transport = httpx.ASGITransport(guarded_app)
        wrong = {"Authorization": f"Bearer {write_key('0' * 12, new_secret())}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://tiny") as client:

            async def check(path: str, method: str, headers: dict[str, str]) -> None:
                response = await client.request(method, re.sub(r"\{.*?\}", "x", path), headers=headers)
                if path in PROBES or (path in OPEN and method in ("GET", "HEAD")):
                    assert response.status_code != 401, (method, path)
                    return
                assert response.status_code == 401, (method, path)
                assert response.headers["www-authenticate"] == "Bearer"
                if method != "HEAD":
                    error = response.json()["error"]
                    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")

            every = {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"}
            bad = ({}, wrong, {"Authorization": "Basic YTpi"}, {"Authorization": "Bearer"})
            await asyncio.gather(
                *(check(path, method, headers) for path in found for method in found[path] | every for headers in bad)
            )

    asyncio.run(run())


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/",
        "//v1/models",
        "/ui/../v1/models",
        "/ui/%2e%2e/v1/models",
        "/ui/..%2fv1/models",
        "/health/../v1/models",
        "/health/",
        "/live%2f..%2fmetrics",
        "/v1/models?key=/ui/",
        "/V1/MODELS",
        "/ui/../../serve/app.py",
        "/ui/%2e%2e/app.py",
        "/ui/....//app.py",
        "/ui//etc/passwd",
        "/ui/%00",
    ],
)
def test_no_spelling_of_a_path_gets_around(module_url: str, path: str) -> None:
    status, body = raw_get(module_url, path)
    assert status in (400, 401, 404, 405)
    assert b"max_model_len" not in body
    assert b"def create_app" not in body
    assert b"root:" not in body


@pytest.fixture(scope="module")
def module_url(
    serve: Serve, make_engine: Callable[..., Engine], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    path = tmp_path_factory.mktemp("keys") / "keys.db"
    with serve(make_engine(context=128), ServerSettings(auth=True, keys_db=str(path))) as url:
        yield url


def raw_get(url: str, path: str) -> tuple[int, bytes]:
    """A client that does not tidy up the path."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    try:
        connection.putrequest("GET", path, skip_accept_encoding=True)
        connection.endheaders()
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_openais_client_with_a_key_and_without(keyed: Keyed) -> None:
    key = keyed.store.create("alice")
    with openai.OpenAI(base_url=f"{keyed.url}/v1", api_key=key) as client:
        assert client.models.list().data[0].id == "tiny"
        assert client.chat.completions.create(model="tiny", **CHAT).usage
    with (
        openai.OpenAI(base_url=f"{keyed.url}/v1", api_key="none") as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        client.models.list()
    assert caught.value.code == "invalid_api_key"


def test_wrong_expired_revoked_and_rotated_keys(keyed: Keyed) -> None:
    expired = keyed.store.create("expired", lifetime=-1)
    revoked = keyed.store.create("revoked")
    keyed.store.revoke(revoked[3:15])
    old = keyed.store.create("rotated")
    new = keyed.store.rotate(old[3:15])
    wrong = write_key(new[3:15], new_secret())
    messages = {expired: "expired on", revoked: "was revoked", old: "no such key", wrong: "no such key"}
    for key, message in messages.items():
        response = keyed.chat(key)
        assert response.status_code == 401
        assert message in response.json()["error"]["message"]
        assert key not in response.text
    assert keyed.chat(new).status_code == 200


def test_a_key_works_and_ends_while_the_server_runs(keyed: Keyed) -> None:
    def status_becomes(key: str, status: int) -> bool:
        return any(keyed.chat(key).status_code == status for _ in range(600))

    keyed.chat(None)  # the keys were read before this one was made
    key = keyed.store.create("alice")
    assert status_becomes(key, 200)
    keyed.store.revoke(key[3:15])
    assert status_becomes(key, 401)


def test_metrics_are_an_admins(keyed: Keyed) -> None:
    user, admin = keyed.store.create("alice"), keyed.store.create("eve", role="admin")
    answers = [
        httpx.get(f"{keyed.url}/metrics", headers={"Authorization": f"bearer {key}"}).status_code
        for key in (user, admin)
    ]
    assert answers == [403, 200]
    assert keyed.chat(admin).status_code == 200


def test_usage_is_written_down(keyed: Keyed) -> None:
    key = keyed.store.create("alice")
    used = [
        keyed.chat(key, stream=stream, stream_options=options).text
        for stream, options in ((False, None), (True, {"include_usage": True}))
    ]
    usages = [json.loads(used[0])["usage"], json.loads(used[1].split("data: ")[-2])["usage"]]
    prompt, completion = (sum(usage[kind] for usage in usages) for kind in ("prompt_tokens", "completion_tokens"))
    expected = Usage(2, prompt, completion)
    assert expected.prompt_tokens > 10
    for _ in range(1000):
        found = keyed.ledger.totals(day(time.time())[:7]).get(key[3:15])
        if found == expected:
            break
        time.sleep(0.02)
    assert found == expected


def test_keys_are_in_no_log_and_no_error(keyed: Keyed, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    good, bad = keyed.store.create("alice"), write_key("0" * 12, new_secret())
    texts = []
    for key in (good, bad):
        headers = {"Authorization": f"Bearer {key}", "x-request-id": key}
        for method, path, body in (
            ("GET", f"/v1/models/{key}", None),
            ("GET", f"/v1/models?api_key={key}", None),
            ("POST", "/v1/chat/completions", {**CHAT, "model": "tiny", "user": key}),
            ("POST", "/v1/chat/completions", {"messages": key}),
            ("GET", f"/{key}", None),
        ):
            response = httpx.request(method, keyed.url + path, json=body, headers=headers, timeout=60)
            assert key not in str(response.headers)
            texts.append(response.text if "models/" not in path else "")  # which says back what it was asked for
    last = "/nw_000000000000_..."
    for _ in range(500):
        if f'"path": "{last}"' in (log := keyed.log.read_text()):  # written after the answer is sent
            break
        time.sleep(0.02)
    assert last in log
    for key in (good, bad):
        secret = key[16:]
        assert secret not in log
        assert not any(secret in text for text in texts)
        assert not any(secret in record.getMessage() for record in caplog.records if record.name != "httpx")
    assert "the prompt of a stranger" not in log
    assert f'"key": "{good[3:15]}"' in log


def test_settings_do_not_print_passwords() -> None:
    settings = ServerSettings(auth=True, keys_db="postgresql://u:hunter2@h/d", redis_url="redis://:hunter2@h/0")
    assert "hunter2" not in repr(settings)


def test_a_redis_url_that_is_none(random_engine: Engine, tmp_path: Path) -> None:
    settings = ServerSettings(auth=True, keys_db=str(tmp_path / "keys.db"), redis_url="http://:hunter2@h/0")
    engine = AsyncEngine(random_engine)
    with pytest.raises(UserError, match="no Redis URL") as caught:
        create_app(engine, name="tiny", settings=settings)
    engine.shutdown()
    assert "hunter2" not in str(caught.value)
