"""Programs that behave badly are contained, and only a program that reaches its end passes."""

from __future__ import annotations

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nanoworks.common.errors import UserError
from nanoworks.tasks import sandbox
from nanoworks.tasks.sandbox import Sandbox

needs_namespaces = pytest.mark.skipif(bool(sandbox._obstacle()), reason=f"no sandbox here: {sandbox._obstacle()}")


PATIENT = {"seconds": 60.0}  # a busy machine is no reason to fail


def run(program: str, **limits) -> str:
    """Run a program that must not pass; return why it did not."""
    execution = Sandbox(**{**PATIENT, **limits}).run(program)
    assert not execution.passed
    assert execution.error
    return execution.error


@needs_namespaces
def test_a_program_that_ends_passes():
    program = "import hashlib, re, math, random, collections\nassert hashlib.md5(b'x').hexdigest()[0] == '9'"
    assert Sandbox(**PATIENT).run(program) == sandbox.Execution(True, "")


@needs_namespaces
@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("assert 1 == 2, 'not equal'", "AssertionError: not equal"),
        ("def f(:", "SyntaxError"),
        ("def f(): f()\nf()", "RecursionError"),
        ("import os; os._exit(0)\nassert False", "ended before"),
        ("import sys; sys.exit(0)\nassert False", "SystemExit: 0"),
        ("import os; os.closerange(0, 64)\nassert False", "ended before"),
        ("import builtins, os\nos.write = os._exit = builtins.print = builtins.len = None\nassert False", "Assertion"),
        ("class E(Exception):\n  def __str__(self): raise SystemExit(0)\nraise E", "ended before"),
        ("import os\nfor fd in range(3, 64):\n  try: os.write(fd, b'passed')\n  except OSError: pass", "passed"),
        ("import ctypes; ctypes.string_at(0)", "ended before"),
        ("import os; os.kill(-1, 9)\nassert False", ""),
        ("import os; os.killpg(0, 9)", "ended before"),
        ("x = []\nwhile True: x.append(bytearray(10**7))", "MemoryError"),
        ("f = open('/tmp/x', 'wb')\nwhile True: f.write(bytes(10**6))", "File too large"),
        ("n = 0\nwhile True: n += 1; open(f'/tmp/{n}', 'wb').write(bytes(10**6))", "No space left"),
        ("open('/usr/x', 'w')", "Read-only file system|Permission denied"),
        ("import os; raise SystemExit(os.path.exists('/proc') or os.path.exists('/home'))", "SystemExit: False"),
        ("import os; os.mkdir('/tmp/d'); os.chroot('/tmp/d')", "Operation not permitted"),
    ],
)
def test_nothing_but_reaching_the_end_passes(program, error):
    assert any(part in run(program) for part in error.split("|"))


@needs_namespaces
@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(1000)"])
def test_time_is_limited(program):
    assert run(program, seconds=0.5) == "ran longer than 0.5 s"


@needs_namespaces
def test_processes_are_limited():
    program = """
import os, time
n = 0
try:
    while True:
        if os.fork() == 0:
            time.sleep(100)
        n += 1
except OSError:
    raise SystemExit(n)
"""
    assert int(run(program, processes=6).removeprefix("SystemExit: ")) in range(1, 7)


@needs_namespaces
def test_forks_without_end_are_killed_with_the_program():
    program = "import os\nwhile True:\n  try:\n    if os.fork() == 0: os.setsid()\n  except OSError: pass"
    assert run(program, seconds=0.5) == "ran longer than 0.5 s"
    deadline = time.monotonic() + 30  # programs of other tests on this machine are soon gone, too
    while survivors := _sandboxed_processes():
        assert time.monotonic() < deadline, f"still alive: {survivors}"
        time.sleep(0.1)


def _sandboxed_processes() -> list[str]:
    """Processes whose command line holds the source of sandbox_child.py, as a fork of it does."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"The inside of the sandbox" in (process / "cmdline").read_bytes():
                found.append(process.name)
        except OSError:
            continue
    return found


@needs_namespaces
def test_there_is_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        port = server.getsockname()[1]
        assert "unreachable" in run(f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)")
        with pytest.raises(BlockingIOError):
            server.accept()


@needs_namespaces
def test_files_of_the_machine_can_be_neither_read_nor_changed(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("untouched")
    os.chmod(secret, 0o666)
    assert "No such file" in run(f"open({str(secret)!r}).read()")
    assert "No such file" in run(f"open({str(secret)!r}, 'w').write('changed')")
    assert secret.read_text() == "untouched"
    repository = str(Path(sandbox.__file__))
    assert "No such file" in run(f"open({repository!r})")


@needs_namespaces
def test_programs_run_side_by_side():
    programs = ["pass" if i % 2 else f"assert False, {i}" for i in range(16)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(Sandbox(**PATIENT).run, programs))
    assert [r.passed for r in results] == [bool(i % 2) for i in range(16)]
    assert [r.error for r in results[::2]] == [f"AssertionError: {i}" for i in range(0, 16, 2)]


def test_without_namespaces_it_refuses(monkeypatch):
    monkeypatch.setattr(sandbox, "_obstacle", lambda: "there is no `unshare` command")
    with pytest.raises(UserError, match=r"no `unshare` command.*--unsafe"):
        Sandbox().run("pass")


@pytest.mark.parametrize(
    ("program", "error", "seconds"),
    [
        ("pass", "", 60),
        ("assert False, 'no'", "AssertionError: no", 60),
        ("import os; os._exit(0)", "ended before", 60),
        ("x = []\nwhile True: x.append(bytearray(10**7))", "MemoryError", 60),
        ("f = open('x', 'wb')\nwhile True: f.write(bytes(10**6))", "File too large", 60),
        ("while True: pass", "ran longer", 0.5),
    ],
)
def test_told_to_it_runs_without_namespaces_but_with_the_limits(monkeypatch, program, error, seconds):
    monkeypatch.setattr(sandbox, "_obstacle", lambda: "there is no `unshare` command")
    execution = Sandbox(seconds=seconds, allow_unsandboxed=True).run(program)
    assert execution.passed == (error == "")
    assert error in execution.error
