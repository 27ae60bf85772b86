"""Training speed on a CPU: nanoworks beside `plain` and beside the limit set by matrix products.

    python benchmarks/train.py [--rounds 9] [--threads 2]

Both sides train the same model (depth 4, width 256, vocabulary 4096) on the same 4 rows of 512 tokens, eager, in
one process and in turns, so that they meet the same load on the machine and share every setting of it. A round
times each side and the machine's rate for matrix products; the figures are medians over the rounds. The limit is
the time the products of a step alone would take at those rates. Everything is run twice: with glibc's
default allocator settings, and with `nanoworks.common.allocator.keep_freed_memory` for both sides.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from plain import plain_step
from torch import Tensor

from nanoworks.common.allocator import keep_freed_memory
from nanoworks.models import build_model, config_from_dict
from nanoworks.nn.context import DenseContext
from nanoworks.nn.linear import set_compute_dtype
from nanoworks.nn.onednn import matmul_nt
from nanoworks.parallel import SingleDevice
from nanoworks.train.optim import MuonAdamW

DEPTH, DIM, HEADS, VOCAB, B, T = 4, 256, 2, 4096, 4, 512
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STEPS_A_ROUND = 2


@dataclass(frozen=True)
class Timing:
    wall: float
    cpu: float

    @classmethod
    def of(cls, function: Callable[[], object], repeats: int) -> Timing:
        """Seconds a call, on the clock and of processor time over all threads."""
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(repeats):
            function()
        return cls((time.perf_counter() - wall) / repeats, (time.process_time() - cpu) / repeats)


def our_step(tokens: Tensor, targets: Tensor, dtype: torch.dtype) -> Callable[[], float]:
    """A training step as the Trainer takes it."""
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
        strategy.backward(loss)
        strategy.clip(model, 1.0)
        strategy.step(optimizer, 1.0, 300)
        return loss.item()

    return step


def model_flops() -> float:
    """FLOPs of the products of one step: forward once, backward twice that, attention over the causal half."""
    tokens = B * T
    linear = 2 * tokens * (DEPTH * 12 * DIM * DIM + VOCAB * DIM)
    attention = DEPTH * 4 * tokens * (T + 1) / 2 * DIM
    return 3 * (linear + attention)


def muon_flops() -> float:
    """FLOPs of Newton-Schulz, always bfloat16: X X^T, its square, and their product with X, five times."""
    shapes = [(DIM, DIM)] * 4 + [(DIM, 4 * DIM)] * 2
    return DEPTH * 5 * sum(4 * r * r * c + 2 * r**3 for r, c in shapes)


def gemm_rate(dtype: torch.dtype, pick: Callable[[Timing], float]) -> Callable[[Timing], float]:
    flops = 2.0 * B * T * DIM * 4 * DIM
    return lambda timing: flops / pick(timing)


def product(dtype: torch.dtype) -> Callable[[], Tensor]:
    """The product of an MLP's first layer."""
    x, w = torch.randn(B * T, DIM).to(dtype), torch.randn(4 * DIM, DIM).to(dtype)
    return lambda: matmul_nt(x, w)


PRODUCT_FLOPS = 2.0 * B * T * DIM * 4 * DIM


def measure(rounds: int, allocator: str) -> None:
    """Print the rows of the table for this process's allocator setting."""
    torch.manual_seed(0)
    tokens, targets = torch.randint(0, VOCAB, (2, B, T))
    products = {name: product(dtype) for name, dtype in DTYPES.items()}
    for name, dtype in DTYPES.items():
        sides = {
            "plain": plain_step(
                tokens, targets, depth=DEPTH, dim=DIM, heads=HEADS, vocab_size=VOCAB, dtype=dtype
            ),
            "nanoworks": our_step(tokens, targets, dtype),
        }
        seen: dict[str, list[Timing]] = {side: [] for side in (*sides, *products)}
        for i in range(rounds + 1):
            for side, step in sides.items():
                timing = Timing.of(step, STEPS_A_ROUND)
                seen[side] += [timing] if i else []  # the first round warms up
            for key, multiply in products.items():
                timing = Timing.of(multiply, 20)
                seen[key] += [timing] if i else []
        for side in sides:
            wall, cpu = (statistics.median(getattr(t, c) for t in seen[side]) for c in ("wall", "cpu"))
            ratio = [
                statistics.median(
                    getattr(p, c) / getattr(t, c) for p, t in zip(seen["plain"], seen[side], strict=True)
                )
                for c in ("wall", "cpu")
            ]
            share = statistics.median(
                (model_flops() * model.cpu + muon_flops() * bf16.cpu) / PRODUCT_FLOPS / t.cpu
                for model, bf16, t in zip(seen[name], seen["bf16"], seen[side], strict=True)
            )
            print(
                f"| {name} | {allocator} | {side} | {B * T / wall:,.0f} | {B * T / cpu:,.0f} | "
                f"{ratio[0]:.2f} | {ratio[1]:.2f} | {share:.0%} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--allocator", choices=["default", "kept"], help="only this setting, in this process")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.allocator is not None:
        if args.allocator == "kept" and not keep_freed_memory():
            print("(the C library is not glibc: no allocator setting)")
            return
        measure(args.rounds, args.allocator)
        return
    print(f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}, {args.rounds} rounds\n")
    print("| dtype | allocator | side | tokens/s | tokens/CPU-s | x plain | x plain, CPU | of the limit, CPU |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for allocator in ("default", "kept"):
        # A process of its own: the setting cannot be taken back.
        own = [sys.executable, __file__, "--rounds", str(args.rounds), "--threads", str(args.threads)]
        subprocess.run([*own, "--allocator", allocator], check=True)


if __name__ == "__main__":
    main()
