from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import typer
from fastapi import FastAPI
from typer.testing import CliRunner

from nanoworks.cli.serve import serve_command
from nanoworks.common.errors import UserError
from nanoworks.nn import kernels
from nanoworks.serve.state import ServerState
from nanoworks.serve.supervisor import Supervisor

app = typer.Typer()
app.command()(serve_command)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_says_where_it_is_answers_and_leaves_cleanly(checkpoint: Path, number: signal.Signals) -> None:
    code = "import typer; from nanoworks.cli.serve import serve_command; typer.run(serve_command)"
    command = [sys.executable, "-c", code, str(checkpoint), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            found = re.search(r"Serving tiny: open (http://127\.0\.0\.1:\d+)", process.stdout.readline())
            assert found
            answer = httpx.post(
                f"{found[1]}/v1/chat/completions",
                json={"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4},
                timeout=60,
            )
            assert answer.json()["model"] == "tiny"
            process.send_signal(number)
            assert process.wait(timeout=30) == 0
            assert "curl " + found[1] in process.stdout.read()
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()


def test_its_options_reach_the_engine_and_the_server(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[ServerState] = []

    def instead_of_serving(app: FastAPI, *_: object, **__: object) -> None:
        served.append(app.state.server)

    monkeypatch.setattr("nanoworks.serve.server.run", instead_of_serving)
    options = ["--port", "0", "--quantize", "int4", *(["--kv-dtype", "int8"] if kernels.available() else [])]
    options += ["--device", "cpu", "--drain-seconds", "3", "--warmup"]
    CliRunner().invoke(app, [str(checkpoint), *options], catch_exceptions=False)
    (state,) = served
    assert isinstance(state.engine, Supervisor)
    config = state.engine.spec.config
    assert config.quantize == "int4"
    assert config.kv_dtype == ("int8" if kernels.available() else "auto")
    assert state.engine.spec.warmup
    assert state.settings.drain_seconds == 3
    assert state.engine.error is not None  # it is stopped with the server
    result = CliRunner().invoke(app, [str(checkpoint), "--quantize", "fp7"])
    assert "int4" in result.output
    assert result.exit_code == 2


def test_what_cannot_be_loaded_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        CliRunner().invoke(app, [str(tmp_path), "--port", "0"], catch_exceptions=False)


def test_a_port_in_use_is_found_before_the_model_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        with pytest.raises(UserError, match=f"{port}: the port is in use"):
            CliRunner().invoke(app, [str(tmp_path / "missing"), "--port", port], catch_exceptions=False)
