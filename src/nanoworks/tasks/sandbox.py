"""Runs Python programs that a model wrote, kept from the machine, its network and its files.

A program runs in a process of its own with limits on time, processor time, memory, processes and file size,
inside new mount, network, PID, IPC and host-name namespaces (`unshare`, Linux). It sees an in-memory disk
with the Python installation and the system libraries, read-only, and nothing else; no network device; no
process but its own. Started by root it becomes a user without a name, started by anyone else it lives in a
user namespace; either way it holds no capability.

A program passes when it reaches its end, not when it exits with 0. This keeps the machine safe and accidents
from passing; a program that searches its own memory for a way to cheat can find one.

Where namespaces are not to be had (containers that forbid them, macOS) `Sandbox` refuses to run, unless told
`allow_unsandboxed`: then the limits remain, and nothing else.
"""

from __future__ import annotations

import functools
import marshal
import math
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from nanoworks.common.errors import UserError

_UNSHARE = ["unshare", "--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]
_OWN_USER = ["--user", "--map-root-user"]
_STARTUP_SECONDS = 10.0
"""Time to start a process and its namespaces on a busy machine, beyond the program's own time."""


@dataclass(frozen=True)
class Execution:
    passed: bool
    error: str
    """What stopped the program; empty when it passed."""


@dataclass(frozen=True)
class Sandbox:
    """Limits of one program; `processes` includes threads."""

    seconds: float = 5.0
    memory_bytes: int = 512 * 2**20
    disk_bytes: int = 16 * 2**20
    processes: int = 8
    allow_unsandboxed: bool = False

    def check(self) -> None:
        """Raise UserError when programs cannot be isolated here and `allow_unsandboxed` is not set."""
        if not self.allow_unsandboxed and (reason := _obstacle()):
            raise UserError(
                f"cannot run generated code in a sandbox here ({reason}); run it as an ordinary user of a Linux "
                "machine where `unshare --user --net true` works, or accept the risk: allow_unsandboxed: true "
                "(nanoworks eval: --unsafe)"
            )

    def run(self, program: str) -> Execution:
        """Run `program` to its end; UserError as `check`. Safe to call from several threads at once."""
        self.check()
        return self._run(program, isolate=not _obstacle())

    def _run(self, program: str, isolate: bool) -> Execution:
        as_root = os.geteuid() == 0
        command = [sys.executable, "-I", "-S", "-c", _child_source()]
        if isolate:
            command = [*_UNSHARE, *([] if as_root else _OWN_USER), *command]
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=directory,
                env={"PATH": os.defpath},
            )
            job = {
                "program": program,
                "token": secrets.token_hex(16),
                "seconds": self.seconds,
                "limits": self._limits(),
                "isolate": isolate,
                "root": directory,
                "visible": _visible_paths() if isolate else [],
                "disk_bytes": self.disk_bytes,
                # A user of its own for every program, so that the limit on processes counts only its own.
                "uid": 20_000 + process.pid % 40_000 if as_root else None,
            }
            try:
                out, err = process.communicate(marshal.dumps(job), timeout=self.seconds + _STARTUP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                return Execution(False, "the sandbox did not answer")
        verdict = out.decode(errors="replace")
        if not verdict:
            verdict = "failed: the sandbox itself: " + err.decode(errors="replace").strip().rpartition("\n")[2]
        return Execution(verdict == "passed", "" if verdict == "passed" else verdict.removeprefix("failed: "))

    def _limits(self) -> dict[str, int]:
        return {
            "RLIMIT_CPU": math.ceil(self.seconds) + 1,
            "RLIMIT_AS": self.memory_bytes,
            "RLIMIT_FSIZE": self.disk_bytes,
            "RLIMIT_NPROC": self.processes,
            "RLIMIT_NOFILE": 64,
            "RLIMIT_CORE": 0,
        }


@functools.cache
def _obstacle() -> str:
    """Return why programs cannot be isolated here, empty if they can; found by doing it once."""
    if shutil.which("unshare", path=os.defpath) is None:
        return "there is no `unshare` command"
    return Sandbox()._run("pass", isolate=True).error


@functools.cache
def _child_source() -> str:
    return Path(__file__).with_name("sandbox_child.py").read_text(encoding="utf-8")


@functools.cache
def _visible_paths() -> list[str]:
    """What a Python program needs to see: the interpreter's installation and the system's libraries."""
    system = [
        "/usr",
        "/bin",
        "/lib",
        "/lib32",
        "/lib64",
        "/nix/store",
        "/etc/ld.so.cache",
        "/dev/null",
        "/dev/urandom",
    ]
    python = [str(Path(p).resolve()) for p in (sys.base_prefix, sys.base_exec_prefix)]
    paths = dict.fromkeys([*system, *python])
    nested = [p for p in paths if any(p != q and Path(p).is_relative_to(q) for q in paths)]
    return [p for p in paths if os.path.lexists(p) and p not in nested]
