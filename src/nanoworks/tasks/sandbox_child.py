"""The inside of the sandbox: runs one untrusted Python program. Standard library only, no import of ours.

`sandbox.py` starts the text of this file as a process in fresh namespaces and writes one job to its stdin.
The process becomes the *init* of the sandbox: it hides the machine's files, gives up its privileges and forks
the program. The program sends a token through a pipe when it has reached its end; init compares it and writes
its verdict to stdout, `passed` or `failed: ` and the reason. When init exits, the kernel kills whatever is
left in its PID namespace.

Init holds the clock and the verdict, so what the program does to its standard streams, its builtins or its
exit status cannot make it pass. It starts once per program, so it imports only what loads fast (no json, no
contextlib).
"""

from __future__ import annotations

import ctypes
import marshal
import os
import resource
import select
import sys

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC = 1, 2, 4, 32, 4096, 16384
MNT_DETACH = 2
PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 4, 38
CAPABILITY_VERSION_3 = 0x20080522
SIGKILL = 9
REPORT_LIMIT = 4096


def main() -> None:
    job = marshal.load(sys.stdin.buffer)
    if job["isolate"]:
        hide_files(job["root"], job["visible"], job["disk_bytes"])
        drop_privileges(job["uid"])
    report, program_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(report)
        run_program(job["program"], job["token"], job["limits"], program_end)
    os.close(program_end)
    os.write(1, verdict(report, job["token"], job["seconds"]).encode(errors="replace"))
    try:  # noqa: SIM105 (contextlib, see above)
        os.killpg(child, SIGKILL)
    except ProcessLookupError:
        pass


def hide_files(root: str, visible: list[str], disk_bytes: int) -> None:
    """Make an empty in-memory file system the root, with the `visible` paths in it, read-only."""
    libc = ctypes.CDLL(None, use_errno=True)
    call(libc.mount, b"tmpfs", root.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, b"mode=755,size=%d" % disk_bytes)
    for path in visible:
        inside = root + path
        os.makedirs(os.path.dirname(inside), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), inside)
            continue
        if os.path.isdir(path):
            os.makedirs(inside, exist_ok=True)
        else:
            os.close(os.open(inside, os.O_CREAT | os.O_WRONLY))
        call(libc.mount, path.encode(), inside.encode(), None, MS_BIND | MS_REC, None)
        # A user namespace may not take away the flags (nosuid, nodev, noexec) that the mount has outside.
        flags = MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | os.statvfs(inside).f_flag & 0xF
        call(libc.mount, None, inside.encode(), None, flags, None)
    os.makedirs(root + "/tmp", exist_ok=True)
    os.chmod(root + "/tmp", 0o1777)
    os.chdir(root)
    call(libc.pivot_root, b".", b".")
    call(libc.umount2, b".", MNT_DETACH)  # the old root, which pivot_root left stacked on the new one
    os.chdir("/tmp")


def drop_privileges(uid: int | None) -> None:
    """Become user `uid` (None: stay), without capabilities and without a way to regain any."""
    libc = ctypes.CDLL(None, use_errno=True)
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    call(libc.prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call(libc.capset, (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)())
    call(libc.prctl, PR_SET_DUMPABLE, 0, 0, 0, 0)  # the program may not read or trace init


def call(function: ctypes._NamedFuncPointer, *args: object) -> None:
    if function(*args) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{function.__name__}: {os.strerror(error)}")


def run_program(program: str, token: str, limits: dict[str, int], report: int) -> None:
    """In the forked process: take the limits, run the program, report how it ended. Does not return."""
    write, leave = os.write, os._exit  # the program may replace them
    os.setpgid(0, 0)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.close(null)
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))
    try:
        exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
        message = token
    except BaseException as error:  # SystemExit, too: a program that leaves early has not run its tests
        message = f"{type(error).__name__}: {error}"
    write(report, message.encode(errors="replace")[:REPORT_LIMIT])
    leave(0)


def verdict(report: int, token: str, seconds: float) -> str:
    """Return `passed` or `failed: reason` once the program has reported, died or run out of time."""
    ready, _, _ = select.select([report], [], [], seconds)
    if not ready:
        return f"failed: ran longer than {seconds:g} s"
    message = os.read(report, REPORT_LIMIT).decode(errors="replace")
    if message == token:
        return "passed"
    return "failed: " + (message or "ended before its tests did")


if __name__ == "__main__":
    main()
