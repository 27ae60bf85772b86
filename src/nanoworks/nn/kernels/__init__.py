"""C++ kernels for inference on a CPU: packed matrix products and paged attention (see gemm.h and attention.h).

Built on first use by PyTorch's extension builder, in about twenty seconds, and kept in the user's cache; after that,
loading takes milliseconds. Where they cannot be had (no compiler, a processor without the instructions, another
system), `why_not` says so and everything runs through PyTorch instead. `NANOWORKS_KERNELS=0` switches them off.

    python -m nanoworks.nn.kernels      # builds them and says whether they work
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent
_SOURCES = ("gemm.cpp", "attention.cpp", "layers.cpp", "ops.cpp")
_FLAGS = ["-O3", "-march=native", "-fopenmp", "-std=c++20"]
_NEEDED = ("avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16")

_log = logging.getLogger(__name__)


def available() -> bool:
    """Whether `torch.ops.nanoworks` can be called; builds it when it never was."""
    return why_not() is None


@functools.cache
def why_not() -> str | None:
    """None when the kernels work, else the reason in one line, which is also logged once."""
    try:
        _load()
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = str(error).strip().splitlines()[-1]
        _log.warning("CPU kernels are not available (%s): inference runs through PyTorch, more slowly", reason)
        return reason
    return None


def _load() -> None:
    if os.environ.get("NANOWORKS_KERNELS", "1") == "0":
        raise RuntimeError("switched off by NANOWORKS_KERNELS=0")
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise RuntimeError(f"written for Linux on x86-64, not {platform.system()} on {platform.machine()}")
    features = _cpu_features()
    if missing := [name for name in _NEEDED if name not in features]:
        raise RuntimeError(f"the processor lacks {', '.join(missing)}")
    library = _cache_folder() / f"{_fingerprint(features)}.so"
    if not library.exists():
        _build(library)
    torch.ops.load_library(str(library))


def _cpu_features() -> frozenset[str]:
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    return frozenset(flags.split())


def _cache_folder() -> Path:
    base = os.environ.get("NANOWORKS_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "nanoworks" / "kernels"


def _fingerprint(features: frozenset[str]) -> str:
    """Of all that the library is made from: another one never loads it."""
    content = hashlib.sha256()
    for path in sorted(_FOLDER.glob("*.[ch]*")):
        if path.suffix in (".cpp", ".h"):
            content.update(path.name.encode() + path.read_bytes())
    content.update(repr((torch.__version__, _FLAGS, sorted(features))).encode())
    return content.hexdigest()[:20]


def _build(library: Path) -> None:
    """Compile aside and move into place, so that two processes may build at once and a killed build leaves nothing."""
    from torch.utils import cpp_extension  # slow to import, and needed once

    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler) is None:
        raise RuntimeError(f"no C++ compiler: install {compiler}")
    library.parent.mkdir(parents=True, exist_ok=True)
    _log.info("building the CPU kernels, once, in about twenty seconds")
    path = os.environ.get("PATH", "")
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        try:
            os.environ["PATH"] = f"{sysconfig.get_path('scripts')}{os.pathsep}{path}"  # where ninja is
            cpp_extension.load(
                "nanoworks_kernels",
                [str(_FOLDER / name) for name in _SOURCES],
                extra_cflags=_FLAGS,
                build_directory=folder,
                is_python_module=False,
                is_standalone=False,
            )
        finally:
            os.environ["PATH"] = path
        os.replace(Path(folder) / "nanoworks_kernels.so", library)
