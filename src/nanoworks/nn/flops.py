"""The denominator of MFU: what a device can compute at most."""

from __future__ import annotations

import functools
import time

import torch

from nanoworks.nn.functional import linear

# Dense bfloat16 tensor FLOP/s from the vendors' data sheets, by a part of the device's name.
_BF16_PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "A6000": 155e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s: the data sheet's for a known GPU in bfloat16, else the best rate of a square matrix product here."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, peak in _BF16_PEAKS.items():
            if part in name:
                return peak
    return measured_flops(device, dtype)


def measured_flops(device: torch.device, dtype: torch.dtype, *, size: int = 1024, seconds: float = 0.3) -> float:
    """Best FLOP/s of (size x size) matrix products through the kernel our linear layers use."""
    own = torch.Generator(device).manual_seed(0)  # a measurement must not move the generator that training draws from
    a = torch.randn(size, size, generator=own, device=device, dtype=dtype)
    best, deadline = float("inf"), time.perf_counter() + seconds
    with torch.inference_mode():
        linear(a, a)
        while time.perf_counter() < deadline:
            started = time.perf_counter()
            linear(a, a)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
