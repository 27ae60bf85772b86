from __future__ import annotations

import json
import os
import re
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from nanoworks.common.errors import UserError
from nanoworks.engine import Engine
from nanoworks.serve.server import check_tls, listen
from nanoworks.serve.settings import ServerSettings


def test_a_free_port() -> None:
    with listen("127.0.0.1", 0) as sock:
        assert sock.getsockname()[1] > 0


def test_a_port_in_use_names_the_fix() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"127\.0\.0\.1:{port}: the port is in use.*--port"):
            listen("127.0.0.1", port)


def test_an_address_of_another_machine() -> None:
    with pytest.raises(UserError, match="no such address"):
        listen("192.0.2.1", 0)


def test_a_host_that_is_no_host() -> None:
    with pytest.raises(UserError, match=r"unknown host 'no\.such\.host\.invalid'"):
        listen("no.such.host.invalid", 0)


# --------------------------------------------------------------------------------------------------- TLS


def test_a_certificate_that_cannot_be_used(tmp_path: Path) -> None:
    wrong = tmp_path / "cert.pem"
    wrong.write_text("no certificate")
    with pytest.raises(UserError, match=r"cannot use .*cert\.pem for TLS.*give PEM files"):
        check_tls(ServerSettings(tls_cert=str(wrong)))
    with pytest.raises(UserError, match=r"cannot use .*missing\.pem"):
        check_tls(ServerSettings(tls_cert=str(tmp_path / "missing.pem")))
    with pytest.raises(UserError, match="--tls-key needs the certificate"):
        check_tls(ServerSettings(tls_key=str(wrong)))
    check_tls(ServerSettings())


# ------------------------------------------------------------------------------ connections that misbehave

CHAT = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def port(serve: Any, endless_engine: Engine) -> Iterator[int]:
    with serve(endless_engine, ServerSettings(header_seconds=0.5, drain_seconds=1)) as url:
        yield int(url.rpartition(":")[2])


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def read_all(sock: socket.socket) -> bytes:
    """What comes until the other side closes."""
    return b"".join(iter(lambda: sock.recv(2**16), b""))


def is_alive(port: int) -> bool:
    return httpx.get(f"http://127.0.0.1:{port}/live").status_code == 200


@pytest.mark.parametrize("name", [b"X-Long: ", b"Authorization: Bearer "])
def test_a_header_of_megabytes(port: int, name: bytes) -> None:
    with connect(port) as sock:
        sock.sendall(CHAT + name + b"a" * 8 * 2**20 + b"\r\n\r\n")
        answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert is_alive(port)


def test_headers_without_end_and_an_address_of_megabytes(port: int) -> None:
    for request in (CHAT + b"X-A: b\r\n" * 2**18, b"GET /" + b"a" * 2**21 + b" HTTP/1.1\r\n"):
        with connect(port) as sock:
            sock.sendall(request)
            assert read_all(sock).startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize("sent", [b"", b"GET /live HTTP/1.1\r\n", b"GET /live HTTP/1.1\r\nHost: x\r\n\r\nGET /"])
def test_a_request_that_does_not_begin_is_not_waited_for(port: int, sent: bytes) -> None:
    with connect(port) as sock:
        sock.sendall(sent)
        answers = read_all(sock)  # it is closed: nothing more is sent here
    assert answers.count(b"HTTP/1.1 200") == (b"\r\n\r\n" in sent)


def test_what_is_no_http(port: int) -> None:
    with connect(port) as sock:
        sock.sendall(b"\x16\x03\x01\x02\x00 this is TLS or worse\r\n\r\n")
        assert read_all(sock).startswith(b"HTTP/1.1 400 ")
    assert is_alive(port)


def test_ten_thousand_connections_opened_and_dropped(port: int) -> None:
    files = len(os.listdir("/proc/self/fd"))
    for i in range(10_000):
        with connect(port) as sock:
            if i % 3 == 1:
                sock.sendall(CHAT[: i % len(CHAT)])
            elif i % 3 == 2:  # reset instead of closed
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert is_alive(port)
    until(lambda: len(os.listdir("/proc/self/fd")) < files + 10)


def test_a_slow_reader_delays_nobody_and_gets_all_of_it(port: int, endless_engine: Engine) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3000, "stream": True}).encode()
    finished = endless_engine.stats().requests_finished
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(60)
        sock.connect(("127.0.0.1", port))
        sock.sendall(CHAT + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        until(lambda: endless_engine.stats().requests_finished == finished + 1)  # the engine did not wait for it
        quick = httpx.post(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3},
            timeout=60,
        )
        assert quick.status_code == 200
        answer = read_all(sock)
    text = re.findall(rb'"content":"([ab])"', answer)
    assert b"".join(text) == b"ab" * 1500
    assert b"data: [DONE]" in answer


def test_a_client_gone_in_the_middle_gives_its_blocks_back(port: int, endless_engine: Engine) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "stream": True}).encode()
    sockets = []
    for _ in range(10):
        sock = connect(port)
        sock.sendall(CHAT + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert sock.recv(10) == b"HTTP/1.1 2"
        sockets.append(sock)
    until(lambda: endless_engine.stats().running == 10)
    for i, sock in enumerate(sockets):
        if i % 2:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
    until(lambda: endless_engine.stats().running == endless_engine.stats().blocks_used == 0)
    assert is_alive(port)
