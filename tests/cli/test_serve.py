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
from nanoworks.engine import Engine
from nanoworks.nn import kernels

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


def test_rounded_weights_and_cache(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Engine] = []

    def instead_of_serving(app: FastAPI, *_: object, **__: object) -> None:
        served.append(app.state.engine.engine)
        app.state.engine.shutdown()

    monkeypatch.setattr("nanoworks.serve.server.run", instead_of_serving)
    options = ["--port", "0", "--quantize", "int4", *(["--kv-dtype", "int8"] if kernels.available() else [])]
    CliRunner().invoke(app, [str(checkpoint), *options], catch_exceptions=False)
    assert served[0].config.quantize == "int4"
    assert served[0].config.kv_dtype == ("int8" if kernels.available() else "auto")
    result = CliRunner().invoke(app, [str(checkpoint), "--quantize", "fp7"])
    assert "int4" in result.output
    assert result.exit_code == 2


def test_a_port_in_use_is_found_before_the_model_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        with pytest.raises(UserError, match=f"{port}: the port is in use"):
            CliRunner().invoke(app, [str(tmp_path / "missing"), "--port", port], catch_exceptions=False)
