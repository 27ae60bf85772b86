"""What a run ran on: versions, processor, memory, device and the commit of this code.

The trainer stores it in `run.json`, so that a figure in a report can be traced to a machine. Anything that
cannot be found out is None: a missing `git` must not stop a run.
"""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nanoworks

if TYPE_CHECKING:
    import torch


def environment_info(device: torch.device | None = None) -> dict[str, Any]:
    """Return JSON-able facts about this process, run on `device` (default: the one `auto` chooses).

    Memory is in GiB (2**30 bytes).
    """
    import torch  # not at the top: this floor must not make `import nanoworks` slow

    from nanoworks.common.device import choose_device, memory_bytes

    device = device or choose_device()
    backend: Any = getattr(torch, device.type, None)
    on_cpu = device.type == "cpu"
    return {
        "nanoworks": _version("nanoworks"),
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": _usable_cores(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "device": device.type,
        "device_name": backend.get_device_name(device) if hasattr(backend, "get_device_name") else None,
        "device_count": None if on_cpu else backend.device_count(),
        "device_memory_gib": None if on_cpu else _gib(memory_bytes(device)),
    }


def git_commit() -> str | None:
    """Return the commit this package runs from, with `-dirty` when its files differ; None outside a checkout.

    A package installed into a virtual environment inside somebody's repository is not of that repository:
    only a file that git tracks counts.
    """
    folder = Path(nanoworks.__file__).parent
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = _git(folder, "rev-parse", "--short=12", "HEAD")
    if commit is None:
        return None
    return f"{commit}-dirty" if _git(folder, "status", "--porcelain", "--", ".") else commit


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _usable_cores() -> int:
    """Return the cores this process may use, which in a container are fewer than the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_gib() -> float | None:
    try:
        return _gib(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):
        return None


def _gib(size: int) -> float:
    return round(size / 2**30, 1)
