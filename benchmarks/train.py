"""Training speed on a CPU: nanoworks beside `plain` and beside the limit set by matrix products.

    python benchmarks/train.py [--rounds 9] [--threads 2]

Both sides train the same model (depth 4, width 256, vocabulary 4096) on the same 4 rows of 512 tokens, eager, in
one process and in turns, so that they meet the same load on the machine and share every setting of it. A round
times each side and the machine's rate for matrix products; figures are medians over the rounds, ratios are
taken within a round. CPU seconds are processor time over all threads. The limit is the time that the products
of a step alone would take at the rate of that round.

Everything is run twice: with the C library's default allocator settings, and with memory kept by
`nanoworks.common.allocator.keep_freed_memory` (what `nanoworks train` does) for both sides.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nanoworks.common.allocator import keep_freed_memory
from nanoworks.models import build_model, config_from_dict
from nanoworks.nn.context import DenseContext
from nanoworks.nn.linear import set_compute_dtype
from nanoworks.nn.onednn import matmul_nt
from nanoworks.parallel import SingleDevice
from nanoworks.train.optim import MuonAdamW
from plain import plain_step

DEPTH, DIM, HEADS, VOCAB, B, T = 4, 256, 2, 4096, 4, 512
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Seconds:
    """Of one call: on the clock, and of processor time."""

    wall: float
    cpu: float


def timed(function: Callable[[], object], repeats: int) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        function()
    return Seconds((time.perf_counter() - wall) / repeats, (time.process_time() - cpu) / repeats)


def our_step(tokens: Tensor, targets: Tensor, dtype: torch.dtype) -> Callable[[], float]:
    """A training step with the parts and in the order of the Trainer's."""
    config = {"model_type": "nanochat", "depth": DEPTH, "vocab_size": VOCAB, "max_position_embeddings": T}
    model = build_model(config_from_dict(config))
    model.init_weights()
    set_compute_dtype(model, None if dtype == torch.float32 else dtype)
    optimizer = MuonAdamW(model.param_groups(), MuonAdamW.Options())
    strategy = SingleDevice(torch.device("cpu"))
    weights = torch.ones(targets.shape)

    def step() -> float:
        optimizer.zero_grad()
        hidden = model(tokens, DenseContext(tokens))
        loss = model.head.loss(hidden, targets, weights) / targets.numel()
        loss.backward()
        strategy.clip(model, 1.0)
        strategy.step(optimizer, 1.0, 300)
        return loss.item()

    return step


PRODUCT_FLOPS = 2.0 * B * T * DIM * 4 * DIM


def product(dtype: torch.dtype) -> Callable[[], Tensor]:
    """The product of an MLP's first layer: what the machine can do."""
    x, weight = torch.randn(B * T, DIM).to(dtype), torch.randn(4 * DIM, DIM).to(dtype)
    return lambda: matmul_nt(x, weight)


def model_flops() -> float:
    """FLOPs of the products of one step: forward, twice that for backward; attention over the causal half."""
    linear = 2 * B * T * (DEPTH * 12 * DIM * DIM + VOCAB * DIM)
    attention = DEPTH * 4 * B * T * (T + 1) / 2 * DIM
    return 3 * (linear + attention)


def muon_flops() -> float:
    """FLOPs of Newton-Schulz, always in bfloat16: x x^T, its square, and their sum times x, five times."""
    shapes = [(DIM, DIM)] * 4 + [(DIM, 4 * DIM)] * 2
    return DEPTH * 5 * sum(4 * r * r * c + 2 * r**3 for r, c in shapes)


def measure(dtype: str, rounds: int) -> dict[str, list[Seconds]]:
    """Time a step of each side and one product in each dtype, `rounds` times in turn."""
    torch.manual_seed(0)
    tokens, targets = torch.randint(0, VOCAB, (2, B, T))
    sizes = {"depth": DEPTH, "dim": DIM, "heads": HEADS, "vocab_size": VOCAB}
    runs = {
        "plain": (plain_step(tokens, targets, dtype=DTYPES[dtype], **sizes), 2),
        "nanoworks": (our_step(tokens, targets, DTYPES[dtype]), 2),
        **{name: (product(d), 20) for name, d in DTYPES.items()},
    }
    for function, repeats in runs.values():  # warm up
        timed(function, repeats)
    seen: dict[str, list[Seconds]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, (function, repeats) in runs.items():
            seen[name].append(timed(function, repeats))
    return seen


def report(dtype: str, allocator: str, seen: dict[str, list[Seconds]]) -> None:
    """Print the table's rows for one dtype."""
    limits = [
        Seconds(*(model_flops() * getattr(m, c) + muon_flops() * getattr(n, c) for c in ("wall", "cpu")))
        for m, n in zip(seen[dtype], seen["bf16"], strict=True)
    ]
    for side in ("plain", "nanoworks"):
        columns = []
        for clock in ("wall", "cpu"):
            mine, plain, limit = ([getattr(t, clock) for t in each] for each in (seen[side], seen["plain"], limits))
            columns += [
                f"{B * T / statistics.median(mine):,.0f}",
                f"{statistics.median(p / m for p, m in zip(plain, mine, strict=True)):.2f}",
                f"{statistics.median(x / PRODUCT_FLOPS / m for x, m in zip(limit, mine, strict=True)):.0%}",
            ]
        print(f"| {dtype} | {allocator} | {side} | {' | '.join(columns)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--allocator", choices=["default", "kept"], help="only this setting, in this process")
    parser.add_argument(
        "--rates",
        type=float,
        nargs=2,
        metavar=("FP32", "BF16"),
        help="GFLOP/s of all threads that set the limit, instead of those of the product measured in each round",
    )
    args = parser.parse_args()
    if args.allocator is None:
        print(f"torch {torch.__version__}, {args.threads} threads, {args.rounds} rounds\n")
        print("| dtype | allocator | side | tokens/s | x plain | of limit | tokens/CPU-s | x plain | of limit |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
        for allocator in ("default", "kept"):  # a process each: the setting cannot be taken back
            own = [sys.executable, __file__, *sys.argv[1:], "--allocator", allocator]
            subprocess.run(own, check=True)
        return
    if args.allocator == "kept" and not keep_freed_memory():
        print("(no allocator setting: the C library is not glibc)")
        return
    torch.set_num_threads(args.threads)
    for dtype in DTYPES:
        seen = measure(dtype, args.rounds)
        for name, rate in zip(DTYPES, args.rates or (), strict=False):
            wall = PRODUCT_FLOPS / (rate * 1e9)
            seen[name] = [Seconds(wall, wall * args.threads)] * args.rounds
        report(dtype, args.allocator, seen)


if __name__ == "__main__":
    main()
