from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from nanoworks.cli.chat import chat_command
from nanoworks.common.errors import UserError
from nanoworks.engine import Engine
from nanoworks.nn import kernels

# The session's first terminal becomes its controlling one, so that Ctrl-C typed there is a signal; a shell that starts
# the tests in the background has them ignore it, which would be inherited.
IN_A_TERMINAL = """
import fcntl, signal, termios, typer
signal.signal(signal.SIGINT, signal.default_int_handler)
from nanoworks.cli.chat import chat_command
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
typer.run(chat_command)
"""

app = typer.Typer()
app.command()(chat_command)


def chat(checkpoint: Path, *options: str, stdin: str = "") -> str:
    result = CliRunner().invoke(
        app, [str(checkpoint), "--max-tokens", "8", *options], input=stdin, catch_exceptions=False
    )
    assert result.exit_code == 0
    return result.stdout


def test_one_answer_for_a_script(checkpoint: Path) -> None:
    answer = chat(checkpoint, "--prompt", "hi", "--seed", "1")
    assert answer == chat(checkpoint, "--prompt", "hi", "--seed", "1")
    assert answer != chat(checkpoint, "--prompt", "hi", "--seed", "2")
    assert answer != chat(checkpoint, "--prompt", "hi", "--seed", "1", "--system", "Be kind.")


def test_a_base_model_continues_text(checkpoint: Path) -> None:
    continued = chat(checkpoint, "--complete", "--prompt", "hi", "--temperature", "0")
    assert continued != chat(checkpoint, "--prompt", "hi", "--temperature", "0")
    assert continued.strip()


def test_a_conversation_from_a_pipe(checkpoint: Path) -> None:
    one = chat(checkpoint, "--temperature", "0", stdin="hi\n")
    two = chat(checkpoint, "--temperature", "0", stdin="hi\n/regenerate\n")
    assert two == one + one


def test_rounded_weights_and_cache(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Engine] = []
    start = Engine.__init__
    monkeypatch.setattr(Engine, "__init__", lambda self, *a, **k: (made.append(self), start(self, *a, **k))[1])
    options = ["--prompt", "hi", "--temperature", "0"]
    plain = chat(checkpoint, *options)
    assert chat(checkpoint, *options, "--quantize", "int8").strip()
    assert chat(checkpoint, *options, "--quantize", "int4") != plain
    assert [engine.config.quantize for engine in made] == [None, "int8", "int4"]
    if kernels.available():
        assert chat(checkpoint, *options, "--kv-dtype", "int8").strip()
        assert made[-1].config.kv_dtype == "int8"


def test_no_checkpoint_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        chat(tmp_path, "--prompt", "hi")


def test_a_terminal_ctrl_c_and_ctrl_d(checkpoint: Path) -> None:
    """At the prompt Ctrl-C drops the line and Ctrl-D leaves with status 0."""
    control, terminal = pty.openpty()
    command = [sys.executable, "-c", IN_A_TERMINAL, str(checkpoint), "--max-tokens", "4"]
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True)
    os.close(terminal)
    try:
        read_until(control, "> ")
        os.write(control, b"hi\n")
        read_until(control, "\n> ", "hi")
        # A key pressed while readline changes the terminal's mode may be lost, so both are pressed until they work.
        press_until(control, b"dropped\x03", lambda: shows(control, "\n> "))
        press_until(control, b"\x04", lambda: ended(process))
        assert process.wait() == 0
    finally:
        process.kill()
        process.wait()
        os.close(control)


def press_until(control: int, key: bytes, done: Callable[[], bool]) -> None:
    """Press `key`, again and again, until `done`; what the terminal shows meanwhile is in the error after a minute."""
    deadline, shown = time.monotonic() + 60, ""
    os.write(control, key)
    while not done():
        assert time.monotonic() < deadline, f"pressed {key!r} for a minute; the terminal: {shown!r}"
        shown += drain(control)
        os.write(control, key)


def shows(control: int, end: str) -> bool:
    """Whether the terminal shows `end` within a second."""
    shown, deadline = "", time.monotonic() + 1
    while time.monotonic() < deadline:
        shown += drain(control)
        if end in shown:
            return True
    return False


def drain(control: int) -> str:
    """What the terminal shows now, waiting a moment for it."""
    if not select.select([control], [], [], 0.05)[0]:
        return ""
    return os.read(control, 1024).decode(errors="replace").replace("\r", "")


def ended(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(timeout=1)
    except subprocess.TimeoutExpired:
        return False
    return True


def read_until(control: int, end: str, after: str = "") -> None:
    """Read what the terminal shows until `end` follows `after`; the test's own timeout is the limit."""
    shown = ""
    while end not in shown.partition(after)[2] if after else end not in shown:
        shown += os.read(control, 1024).decode(errors="replace").replace("\r", "")
