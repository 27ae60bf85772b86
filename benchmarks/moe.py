"""Forward and backward of a mixture of experts: the grouped path against a Python loop over the experts.

    python benchmarks/moe.py [--threads 2] [--repeat 20]

The loop is how a mixture is usually first written: for each expert, find its tokens, gather them, run three matrix
products, weigh, add back. Its backward is autograd's. Both compute the same; the benchmark checks it. Sizes are a
small model's micro-batch (many tokens) and one row, or a step of decoding (few tokens for each expert).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoworks.nn.context import DenseContext
from nanoworks.nn.moe import MoE

# tokens, hidden_size, features inside an expert, experts, experts a token
SHAPES = [
    (2048, 128, 192, 8, 2),
    (2048, 128, 64, 32, 4),
    (256, 128, 64, 32, 4),
    (2048, 256, 128, 32, 4),
    (256, 256, 128, 32, 4),
    (128, 256, 128, 32, 4),
    (2048, 512, 256, 32, 4),
]


def loop(moe: MoE, x: Tensor) -> Tensor:
    """What `MoE.forward` computes, one expert after the other."""
    weights, experts = moe.choose(moe.gate(x).float())
    y = torch.zeros_like(x)
    leaves = (moe.experts.gate_proj, moe.experts.up_proj, moe.experts.down_proj)
    # One unbind each: weight[e] would make its backward write a gradient of all experts for each of them.
    gate, up, down = (leaf.weight.unbind() for leaf in leaves)
    dtype = moe.experts.gate_proj.compute_dtype or x.dtype
    for e in range(moe.num_experts):
        rows, ranks = torch.where(experts == e)
        h = x[rows].to(dtype)
        h = F.silu(F.linear(h, gate[e].to(dtype))) * F.linear(h, up[e].to(dtype))
        h = F.linear(h, down[e].to(dtype)) * weights[rows, ranks, None]
        y.index_add_(0, rows, h.to(y.dtype))
    return y


def seconds(step: Callable[[], object], repeat: int) -> float:
    """Best of `repeat`: what the code takes when the machine does nothing else."""
    step()
    best = float("inf")
    for _ in range(repeat):
        started = time.perf_counter()
        step()
        best = min(best, time.perf_counter() - started)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("| tokens | hidden | expert | experts | a token | dtype | loop ms | grouped ms | times |")
    print("| ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: |")
    for N, C, I, E, k in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            moe = MoE(0, hidden_size=C, intermediate_size=I, num_experts=E, num_experts_per_tok=k)
            for leaf in (moe.gate, moe.experts.gate_proj, moe.experts.up_proj, moe.experts.down_proj):
                leaf.compute_dtype = dtype
            x = torch.randn(N, C, requires_grad=True)
            tokens = torch.zeros(1, N, dtype=torch.long)

            def grouped(moe: MoE = moe, x: Tensor = x, tokens: Tensor = tokens) -> Tensor:
                return moe(x, DenseContext(tokens))

            def looped(moe: MoE = moe, x: Tensor = x) -> Tensor:
                return loop(moe, x)

            tolerance = 1e-4 if dtype == torch.float32 else 3e-2
            torch.testing.assert_close(grouped(), looped(), atol=tolerance, rtol=tolerance)
            taken = [
                seconds(lambda f=f: f().square().sum().backward(), args.repeat)  # type: ignore[misc]
                for f in (looped, grouped)
            ]
            name = str(dtype).removeprefix("torch.")
            print(
                f"| {N} | {C} | {I} | {E} | {k} | {name} | {1e3 * taken[0]:.2f} | {1e3 * taken[1]:.2f} "
                f"| {taken[0] / taken[1]:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
