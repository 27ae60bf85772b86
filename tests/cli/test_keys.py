from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from nanoworks.cli.keys import app
from nanoworks.cli.serve import serve_command
from nanoworks.common.errors import UserError
from nanoworks.serve.app import open_access
from nanoworks.serve.auth.keys import read_key
from nanoworks.serve.settings import ServerSettings


class Cli:
    def __init__(self, path: Path) -> None:
        self.path = path

    def run(self, *arguments: str) -> Result:
        return CliRunner().invoke(app, [*arguments, "--keys-db", str(self.path)], catch_exceptions=False)

    def list(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.run("list", "--json").stdout.splitlines()]


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return Cli(tmp_path / "keys.db")


def test_the_life_of_a_key(cli: Cli) -> None:
    made = cli.run("create", "alice", "--requests-per-minute", "60", "--tokens-per-month", "1000000")
    key = made.stdout.strip()
    parts = read_key(key)
    assert parts is not None, "standard output is the key alone, for KEY=$(...)"
    assert "cannot be shown again" in made.stderr
    key_id, secret = parts

    (listed,) = cli.list()
    assert (listed["id"], listed["name"], listed["role"], listed["status"]) == (key_id, "alice", "user", "active")
    assert listed["limits"] == {
        "requests_per_minute": 60,
        "tokens_per_minute": None,
        "concurrent_requests": None,
        "tokens_per_month": 1_000_000,
    }
    cli.run("limit", key_id, "--concurrent-requests", "4")
    assert cli.list()[0]["limits"]["concurrent_requests"] == 4
    assert cli.list()[0]["limits"]["requests_per_minute"] is None

    rotated = cli.run("rotate", key_id, "--overlap-hours", "1").stdout.strip()
    assert read_key(rotated) is not None
    assert rotated != key
    assert rotated.startswith(f"nw_{key_id}_")

    assert cli.run("revoke", key_id).stderr == f"revoked {key_id}\n"
    assert cli.list()[0]["status"] == "revoked"
    with pytest.raises(UserError, match="revoked; create a new one"):
        cli.run("rotate", key_id)
    for output in (cli.run("list"), cli.run("list", "--json")):
        assert secret not in output.output


def test_the_table(cli: Cli) -> None:
    assert "there are no keys yet" in cli.run("list").stderr
    cli.run("create", "[red]odd[/red] name", "--role", "admin", "--expires-days", "0.01", "--tokens-per-minute", "5000")
    heading, row = cli.run("list").stdout.splitlines()
    assert heading.split()[:4] == ["id", "name", "role", "status"]
    assert "[red]odd[/red] name" in row
    assert "active" in row
    assert "5,000" in row


@pytest.mark.parametrize("option", ["--requests-per-minute", "--tokens-per-minute", "--expires-days"])
def test_limits_are_positive(cli: Cli, option: str) -> None:
    assert CliRunner().invoke(app, ["create", "alice", option, "0", "--keys-db", str(cli.path)]).exit_code == 2


def test_the_command_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nanoworks", "keys", "list", "--keys-db", "postgresql://bob:hunter2@127.0.0.1:1/x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot use the database")
    assert "Traceback" not in done.stderr
    assert "hunter2" not in done.stderr


def test_the_options_of_serve(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[ServerSettings] = []

    def instead_of_an_app(engine: Any, *, settings: ServerSettings, **_: object) -> None:
        served.append(settings)
        engine.shutdown()

    monkeypatch.setattr("nanoworks.serve.app.create_app", instead_of_an_app)
    monkeypatch.setattr("nanoworks.serve.server.run", lambda *_, **__: None)
    serve = typer.Typer()
    serve.command()(serve_command)
    keys_db, log = str(tmp_path / "keys.db"), str(tmp_path / "access.log")
    options = ["--port", "0", "--auth", "--access-log", log, "--max-body-mib", "0.5", "--log-prompts"]
    options += ["--cors-origin", "https://a.example", "--cors-origin", "https://b.example"]
    environment = {"NANOWORKS_KEYS_DB": keys_db, "NANOWORKS_REDIS_URL": "redis://127.0.0.1:1/0"}
    CliRunner().invoke(serve, [str(checkpoint), *options], env=environment, catch_exceptions=False)
    (settings,) = served
    assert settings.auth
    assert (settings.keys_db, settings.redis_url) == (keys_db, "redis://127.0.0.1:1/0")
    assert settings.cors_origins == ("https://a.example", "https://b.example")
    assert (settings.access_log, settings.log_prompts, settings.max_body_bytes) == (log, True, 2**19)


def test_a_redis_without_keys() -> None:
    with pytest.raises(UserError, match="of no use without --auth"):
        open_access(ServerSettings(redis_url="redis://h"))
