"""A PostgreSQL and a Redis that the tests start for themselves, and a test skips without the program."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis

_WAIT_SECONDS = 60


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The URL of a server's first database."""
    bin_dir = _postgres_programs()
    # PostgreSQL refuses to run as root, and whom it runs as cannot enter pytest's folders.
    with _service_folder("postgres") as (folder, as_user):
        port = _free_port()
        init = [bin_dir / "initdb", "-D", folder / "data", "-U", "nanoworks", "--auth=trust", "--no-sync"]
        subprocess.run(init, check=True, capture_output=True, cwd=folder, **as_user)
        options = ["-p", str(port), "-k", folder, "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
        url = f"postgresql://nanoworks:not-a-secret@127.0.0.1:{port}/postgres"
        with _running([bin_dir / "postgres", "-D", folder / "data", *options], folder, as_user) as process:
            _wait_for(lambda: psycopg.connect(url, connect_timeout=2).close(), process, psycopg.OperationalError)
            yield url


@contextmanager
def empty_database(postgres_server: str) -> Iterator[str]:
    """Yield the URL of a new database."""
    name = f"test_{time.monotonic_ns()}"
    with psycopg.connect(postgres_server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        yield postgres_server.removesuffix("/postgres") + f"/{name}"
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def postgres_url(postgres_server: str) -> Iterator[str]:
    """The URL of an empty database."""
    with empty_database(postgres_server) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgres"])
def keys_db(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind, as `--keys-db` takes it."""
    if request.param == "sqlite":
        return str(tmp_path / "keys.db")
    url: str = request.getfixturevalue("postgres_url")
    return url


@contextmanager
def running_redis(port: int) -> Iterator[str]:
    """Run a Redis on `port`; yields its URL."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed; scripts/system_packages.sh installs it")
    with _service_folder("redis") as (folder, as_user):
        options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", folder]
        with _running([program, *options], folder, as_user) as process, redis.Redis(port=port) as client:
            _wait_for(client.ping, process, redis.ConnectionError)
            yield f"redis://127.0.0.1:{port}/0"


@pytest.fixture(scope="session")
def redis_server() -> Iterator[str]:
    with running_redis(_free_port()) as url:
        yield url


@pytest.fixture
def redis_url(redis_server: str) -> str:
    """The URL of an empty Redis."""
    with redis.Redis.from_url(redis_server) as client:
        client.flushall()
    return redis_server


@pytest.fixture
def free_port() -> int:
    return _free_port()


def _postgres_programs() -> Path:
    found = shutil.which("postgres")
    places = [Path(found).resolve().parent] if found else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for place in places:
        if (place / "initdb").exists():
            return place
    pytest.skip("PostgreSQL is not installed; scripts/system_packages.sh installs it")


@contextmanager
def _service_folder(name: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield a folder, and what `subprocess` needs to run as the user it belongs to."""
    folder = Path(tempfile.mkdtemp(prefix=f"nanoworks-{name}-"))
    as_user: dict[str, Any] = {}
    try:
        if os.geteuid() == 0:
            user = pwd.getpwnam("nobody")
            os.chown(folder, user.pw_uid, user.pw_gid)
            as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        yield folder, as_user
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _running(command: list[Any], folder: Path, as_user: dict[str, Any]) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, **as_user)
        try:
            yield process
        finally:
            process.send_signal(2)  # both stop at once, without waiting for their clients
            try:
                process.wait(timeout=20)
            finally:
                process.kill()


def _wait_for(ready: Callable[[], Any], process: subprocess.Popen[bytes], not_yet: type[Exception]) -> None:
    deadline = time.monotonic() + _WAIT_SECONDS
    while True:
        try:
            ready()
            return
        except not_yet:
            assert process.poll() is None, "the service did not start"
            assert time.monotonic() < deadline, "the service does not answer"
            time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
