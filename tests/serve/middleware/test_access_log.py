"""Every answer has an id, and a line of JSON in the log that says what it cost but not what it was about."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from nanoworks.common.errors import UserError
from nanoworks.engine import Engine
from nanoworks.serve.middleware.access_log import open_log
from nanoworks.serve.settings import ServerSettings

Serve = Callable[..., AbstractContextManager[str]]

SECRET = "what nobody may read"
CHAT = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 4}


@dataclass
class Logged:
    url: str
    log: Path

    def lines(self, request_id: str, *, expected: int = 1) -> list[dict[str, Any]]:
        """Wait for the lines of a request: one is written after its answer is sent."""
        for _ in range(500):
            found = [json.loads(line) for line in self.log.read_text().splitlines()]
            found = [line for line in found if line["request_id"] == request_id]
            if len(found) >= expected:
                break
            time.sleep(0.02)
        assert len(found) == expected
        return found


@pytest.fixture(scope="module")
def logged(serve: Serve, endless_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Logged]:
    log = tmp_path_factory.mktemp("log") / "access.log"
    with serve(endless_engine, ServerSettings(access_log=str(log))) as url:
        yield Logged(url, log)


def test_a_line_says_who_asked_what_and_how_it_went(logged: Logged) -> None:
    before = time.time()
    response = httpx.post(f"{logged.url}/v1/chat/completions?secret=1", json=CHAT, headers={"x-request-id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    usage = response.json()["usage"]
    (line,) = logged.lines("mine-1")
    assert {**line, "time": "", "seconds": 0, "queue_seconds": 0} == {
        "time": "",
        "request_id": "mine-1",
        "client": "127.0.0.1",
        "key": "",
        "method": "POST",
        "path": "/v1/chat/completions",
        "status": 200,
        "bytes": len(response.content),
        "seconds": 0,
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": 4,
        "finish_reasons": ["length"],
        "queue_seconds": 0,
    }
    assert 0 <= line["queue_seconds"] <= line["seconds"] <= time.time() - before + 0.01
    assert line["time"].endswith("+00:00")
    assert SECRET not in logged.log.read_text()


def test_streams_and_several_prompts_add_up(logged: Logged) -> None:
    body = {"prompt": ["a", "b", "c"], "max_tokens": 3, "stream": True}
    response = httpx.post(f"{logged.url}/v1/completions", json=body, headers={"x-request-id": "sum"})
    (line,) = logged.lines("sum")
    assert (line["completion_tokens"], len(line["finish_reasons"])) == (9, 3)
    assert line["bytes"] == len(response.content)


def test_a_client_that_leaves(logged: Logged) -> None:
    body = {**CHAT, "max_tokens": 15_000, "stream": True}
    headers = {"x-request-id": "left"}
    with httpx.stream("POST", f"{logged.url}/v1/chat/completions", json=body, headers=headers) as response:
        next(response.iter_lines())
    (line,) = logged.lines("left")
    assert line["finish_reasons"] == []
    assert line["completion_tokens"] < 15_000


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/nowhere", None, 404),
        ("POST", "/v1/models", None, 405),
        ("POST", "/v1/chat/completions", {"messages": SECRET}, 400),
    ],
)
def test_refusals_have_a_line_and_an_id_too(logged: Logged, method: str, path: str, body: Any, status: int) -> None:
    response = httpx.request(method, logged.url + path, json=body)
    assert response.status_code == status
    (line,) = logged.lines(response.headers["x-request-id"])
    assert (line["status"], line["path"]) == (status, path)
    assert SECRET not in logged.log.read_text()


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", "line\\nbreak", '"}', "ü".encode("latin-1").decode("latin-1")])
def test_an_id_that_would_spoil_the_log_is_replaced(logged: Logged, given: str) -> None:
    response = httpx.get(f"{logged.url}/v1/models", headers=[(b"x-request-id", given.encode("latin-1"))])
    assert len(response.headers["x-request-id"]) == 32


def test_probes_that_go_well_are_not_news(logged: Logged) -> None:
    for path in ("/live", "/health", "/metrics"):
        httpx.get(logged.url + path)
    httpx.get(f"{logged.url}/v1/models", headers={"x-request-id": "after"})
    logged.lines("after")
    assert not any(path in logged.log.read_text() for path in ("/live", "/health", "/metrics"))


def test_the_log_may_be_moved_away(logged: Logged) -> None:
    logged.log.rename(logged.log.with_suffix(".1"))
    httpx.get(f"{logged.url}/v1/models", headers={"x-request-id": "first"})
    httpx.get(f"{logged.url}/v1/models", headers={"x-request-id": "rotated"})
    logged.lines("rotated")


def test_a_path_cannot_break_out_of_its_line(logged: Logged) -> None:
    response = httpx.get(logged.url + "/%0a%7b%22status%22:200%7d%22")
    (line,) = logged.lines(response.headers["x-request-id"])
    assert line["path"] == '/\n{"status":200}"'


def test_prompts_are_written_only_when_asked_for(
    serve: Serve, make_engine: Callable[..., Engine], tmp_path: Path
) -> None:
    log = tmp_path / "access.log"
    with serve(make_engine(context=128), ServerSettings(access_log=str(log), log_prompts=True)) as url:
        response = httpx.post(f"{url}/v1/chat/completions", json=CHAT)
    (line,) = Logged(url, log).lines(response.headers["x-request-id"])
    assert SECRET in line["prompts"][0]


def test_a_failure_of_ours_has_an_id_and_no_details(
    serve: Serve,
    make_engine: Callable[..., Engine],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("the inner life")

    log = tmp_path / "access.log"
    monkeypatch.setattr("nanoworks.serve.routes.models.check_model", fails)
    with serve(make_engine(context=128), ServerSettings(access_log=str(log))) as url:
        response = httpx.get(f"{url}/v1/models/tiny")
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "inner life" not in response.text
    assert "inner life" in caplog.text
    (line,) = Logged(url, log).lines(response.headers["x-request-id"])
    assert line["status"] == 500


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write the access log"):
        open_log(str(tmp_path / "no" / "access.log"))


def test_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    import logging

    log = open_log("-")
    assert log is not None
    log.handle(logging.makeLogRecord({"msg": "a line with %s"}))
    assert capsys.readouterr().err == "a line with %s\n"
