from __future__ import annotations

import socket

import pytest

from nanoworks.common.errors import UserError
from nanoworks.serve.server import listen


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
