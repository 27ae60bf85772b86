"""Bodies and headers that are too large, and pages of other sites."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from nanoworks.engine import Engine
from nanoworks.serve.settings import ServerSettings

Serve = Callable[..., AbstractContextManager[str]]

LIMIT = 10_000


@pytest.fixture(scope="module")
def url(serve: Serve, random_engine: Engine) -> Iterator[str]:
    with serve(random_engine, ServerSettings(max_body_bytes=LIMIT)) as url:
        yield url


def body_of(size: int) -> bytes:
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}).encode()
    return body + b" " * (size - len(body))


def test_a_body_may_be_as_large_as_the_limit(url: str) -> None:
    headers = {"Content-Type": "application/json"}
    statuses = [
        httpx.post(f"{url}/v1/chat/completions", content=content, headers=headers).status_code
        for content in (body_of(LIMIT), body_of(LIMIT + 1), iter([body_of(LIMIT)]), iter([body_of(LIMIT + 1)]))
    ]
    assert statuses == [200, 413, 200, 413], "of announced length, and in chunks"


def test_what_a_client_reads_when_it_sent_too_much(url: str) -> None:
    for content in (body_of(LIMIT + 1), iter([body_of(LIMIT + 1)])):
        headers = {"Content-Type": "application/json"}
        response = httpx.post(f"{url}/v1/chat/completions", content=content, headers=headers)
        assert response.json()["error"]["type"] == "invalid_request_error"
        assert "10,000 bytes at most" in response.json()["error"]["message"]
        assert response.headers["connection"] == "close"
        assert response.headers["x-request-id"]


@pytest.mark.parametrize("length", ["-1", "1e3", "1" * 30, "0x10", ""])
def test_lengths_that_are_none(url: str, length: str) -> None:
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n"
    assert status_of(url, head.encode()) in (400, 413)


def test_a_body_that_never_ends_is_not_kept(url: str) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    before = psutil.Process().memory_info().rss
    with connected(url) as sock:
        sock.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        answer = send_until_refused(sock, chunk, times=2000)
    assert answer.startswith(b"HTTP/1.1 413")
    assert psutil.Process().memory_info().rss - before < 60e6, "of 131 MB"


@pytest.mark.parametrize("place", ["header", "headers", "path"])
def test_a_header_of_megabytes(url: str, place: str) -> None:
    """Some 20 MB of it, each way to send them. It is refused long before the end."""
    line = {
        "header": b"x" * 0x10000,
        "headers": b"x-a: b\r\n" * 0x2000,
        "path": b"x" * 0x10000,
    }[place]
    head = (
        b"GET /" if place == "path" else b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + b"x-long: " * (place == "header")
    )
    before = psutil.Process().memory_info().rss
    with connected(url) as sock:
        sock.sendall(head)
        answer = send_until_refused(sock, line, times=320)
    assert answer.split(b" ", 2)[1] in (b"400", b"414", b"431")
    assert psutil.Process().memory_info().rss - before < 10e6
    assert httpx.get(f"{url}/v1/models").status_code == 200


def connected(url: str) -> socket.socket:
    address = urlsplit(url)
    assert address.hostname is not None
    return socket.create_connection((address.hostname, address.port), timeout=30)


def send_until_refused(sock: socket.socket, data: bytes, *, times: int) -> bytes:
    """Send `data` again and again until the other side answers; returns its answer."""
    sock.settimeout(0.02)
    for _ in range(times):
        try:
            sock.sendall(data)
        except TimeoutError:
            pass  # it reads no more: now it answers
        except OSError:
            break
        try:
            return sock.recv(4096)
        except TimeoutError:
            continue
    sock.settimeout(30)
    return sock.recv(4096)


def status_of(url: str, request: bytes) -> int:
    with connected(url) as sock:
        sock.sendall(request)
        return int(sock.recv(4096).split(b" ", 2)[1])


def test_other_sites_get_nothing_unless_they_are_named(url: str) -> None:
    for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}):
        response = httpx.get(f"{url}/v1/models", headers=headers)
        assert not any(name.startswith("access-control") for name in response.headers)
    asking = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    assert httpx.options(f"{url}/v1/chat/completions", headers=asking).status_code == 405


def test_sites_that_are_named(serve: Serve, make_engine: Callable[..., Engine]) -> None:
    friend, evil = {"Origin": "https://friend.example"}, {"Origin": "https://evil.example"}
    asks = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
    }
    settings = ServerSettings(cors_origins=("https://friend.example",))
    with serve(make_engine(context=128), settings) as url:
        allowed = httpx.options(f"{url}/v1/chat/completions", headers=friend | asks)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://friend.example"
        assert "authorization" in allowed.headers["access-control-allow-headers"]
        assert "access-control-allow-credentials" not in allowed.headers
        assert httpx.options(f"{url}/v1/chat/completions", headers=evil | asks).status_code == 400
        answer = httpx.get(f"{url}/v1/models", headers=friend)
        assert answer.headers["access-control-allow-origin"] == "https://friend.example"
        assert "access-control-allow-origin" not in httpx.get(f"{url}/v1/models", headers=evil).headers
