"""How fast this machine reads memory: the limit of decoding one sequence, which reads all weights for each token."""

from __future__ import annotations

import time

import torch


def read_gbps(threads: int, *, mebibytes: int = 512, repeat: int = 8) -> float:
    """GB/s of reading a large array once with `threads` threads: the best of `repeat`.

    A sum of int64 over long rows: one addition for eight bytes, which the cores do faster than memory delivers.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        data = torch.ones(mebibytes * 2**20 // 8, dtype=torch.int64)
        best = float("inf")
        for _ in range(repeat + 1):
            started = time.perf_counter()
            data.sum()
            best = min(best, time.perf_counter() - started)
        return data.nbytes / best / 1e9
    finally:
        torch.set_num_threads(before)
