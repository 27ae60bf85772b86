"""Chooses the device and the arithmetic by running small kernels, never by comparing version strings."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F

from nanoworks.common.errors import UserError

log = logging.getLogger("nanoworks")

_ACCELERATORS = ("cuda", "xpu", "mps")


def choose_device(name: str = "auto") -> torch.device:
    """Return the device called `name`; `auto` takes the first of cuda, xpu, mps on which a small kernel runs."""
    if name != "auto":
        if not _runs(name):
            raise UserError(
                f"device {name!r} does not work here: a small matrix product on it failed ({_reason(name)}); "
                "take auto or cpu"
            )
        return torch.device(name)
    for candidate in _ACCELERATORS:
        if _backend(candidate) and _runs(candidate):
            return torch.device(candidate)
    return torch.device("cpu")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the arithmetic dtype; `auto` is bfloat16 on an accelerator that can, else float32."""
    if name == "float32":
        return torch.float32
    works = supports_bfloat16(device)
    if name == "bfloat16":
        if not works:
            raise UserError(f"{device} cannot compute in bfloat16; use hardware.dtype=float32")
        return torch.bfloat16
    if device.type == "cpu":
        return torch.float32
    if not works:
        log.warning("%s cannot compute in bfloat16: using float32", device)
    return torch.bfloat16 if works else torch.float32


@functools.cache
def supports_bfloat16(device: torch.device) -> bool:
    """Whether a bfloat16 matrix product and attention, forward and backward, run and are right on `device`."""

    def probe() -> bool:
        own = torch.Generator(device).manual_seed(0)  # a probe must not move the generator that training draws from
        a = torch.randn(32, 32, generator=own, device=device, dtype=torch.bfloat16, requires_grad=True)
        product = a @ a
        q = product.view(1, 2, 16, 32)
        F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
        exact = a.detach().float() @ a.detach().float()
        return a.grad is not None and bool(torch.allclose(product.float(), exact, atol=0.5, rtol=0.1))

    return _attempt(probe)


@functools.cache
def supports_compile(device: torch.device) -> bool:
    """Whether `torch.compile` builds and runs a small function on `device` (it needs a compiler or Triton)."""

    def probe() -> bool:
        function = torch.compile(lambda x: (x * 2 + 1).relu())
        return bool((function(torch.ones(8, device=device)) == 3).all())

    return _attempt(probe)


def memory_bytes(device: torch.device) -> int:
    """Total memory of the device; for a CPU what the machine (or its container) has, at present free."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "xpu":
        return int(torch.xpu.get_device_properties(device).total_memory)
    return _available_memory()


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has held: allocator peak on CUDA, resident set otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _available_memory() -> int:
    """Bytes the system says can still be allocated without swapping, bounded by the container's limit."""
    import os
    from pathlib import Path

    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        available = min(available, int(text))
    return available


def _backend(name: str) -> bool:
    if name == "mps":
        return torch.backends.mps.is_available()
    module = getattr(torch, name, None)
    return module is not None and module.is_available()


def _runs(name: str) -> bool:
    return name == "cpu" or _attempt(lambda: _small_product(name))


def _small_product(name: str) -> bool:
    a = torch.ones(8, 8, device=name)
    return bool(((a @ a) == 8).all())


def _reason(name: str) -> str:
    try:
        _small_product(name)
    except Exception as error:
        return str(error).splitlines()[0]
    return "wrong result"


def _attempt(probe: Callable[[], bool]) -> bool:
    try:
        return probe()
    except Exception:  # a missing capability shows as many kinds of error
        return False
