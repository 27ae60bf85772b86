"""A mixture of experts, ours against loops over the experts: forward alone, and forward with backward.

    python benchmarks/moe.py [--threads 1] [--repeat 30] [--only-experts 32]

- `transformers` is `MixtralSparseMoeBlock` with `experts_implementation="eager"`, its loop over the experts, on our
  weights.
- `loop` is the same loop by a careful hand: one `unbind` of each stack of matrices, because the backward of each
  `weight[e]` writes a gradient of all experts.

Forward alone is inference: weights in the dtype shown for all, ours packed as the engine has them. With backward it
is training: in bfloat16 transformers' weights are bfloat16, ours and the loop's are float32 and cast at use (so only
these pay for the cast). All three are checked to be equal. Each figure is the best of `--repeat`, the ways taking
turns, with the allocator settings of `nanoworks train`. Sizes are a decoding step, a short row (few tokens for each
expert) and a micro-batch of a small model (many).
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from nanoworks.common.allocator import keep_freed_memory
from nanoworks.nn import kernels
from nanoworks.nn.context import DenseContext
from nanoworks.nn.linear import set_compute_dtype
from nanoworks.nn.moe import MoE
from nanoworks.nn.pack import pack

# tokens, hidden_size, features inside an expert, experts, experts a token
SHAPES = [
    (16, 256, 128, 32, 4),
    (64, 256, 128, 32, 4),
    (16, 512, 256, 32, 4),
    (2048, 128, 192, 8, 2),
    (128, 128, 64, 32, 4),
    (256, 128, 64, 32, 4),
    (2048, 128, 64, 32, 4),
    (128, 256, 128, 32, 4),
    (256, 256, 128, 32, 4),
    (2048, 256, 128, 32, 4),
    (2048, 512, 256, 32, 4),
]
Forward = Callable[[Tensor], Tensor]


def ours(moe: MoE, x: Tensor) -> Tensor:
    return moe(x, DenseContext(torch.zeros(1, x.size(0), dtype=torch.long)))


def loop(moe: MoE, x: Tensor) -> Tensor:
    weights, experts = moe.choose(moe.gate(x).float())
    leaves = (moe.experts.gate_proj, moe.experts.up_proj, moe.experts.down_proj)
    dtype = leaves[0].compute_dtype or x.dtype
    gate, up, down = (leaf.weight.to(dtype).unbind() for leaf in leaves)
    y = torch.zeros_like(x)
    for e in range(moe.num_experts):
        rows, ranks = torch.where(experts == e)
        h = x[rows].to(dtype)
        h = F.silu(F.linear(h, gate[e])) * F.linear(h, up[e])
        y.index_add_(0, rows, (F.linear(h, down[e]) * weights[rows, ranks, None]).to(y.dtype))
    return y


def of_transformers(moe: MoE, dtype: torch.dtype) -> nn.Module:
    """Their block, with the weights of ours."""
    config = MixtralConfig(
        hidden_size=moe.gate.in_features,
        intermediate_size=moe.experts.gate_proj.out_features,
        num_local_experts=moe.num_experts,
        num_experts_per_tok=moe.top_k,
        experts_implementation="eager",
    )
    block = MixtralSparseMoeBlock(config).to(dtype)
    gate, up, down = (leaf.weight for leaf in (moe.experts.gate_proj, moe.experts.up_proj, moe.experts.down_proj))
    weights = {"gate.weight": moe.gate.weight, "experts.gate_up_proj": torch.cat([gate, up], 1)}
    block.load_state_dict({**weights, "experts.down_proj": down})
    return block


def step(forward: Forward, leaves: Sequence[Tensor], x: Tensor) -> list[Tensor]:
    """Output, and gradients of all `leaves`."""
    for leaf in leaves:
        leaf.grad = None
    y = forward(x)
    y.backward(torch.ones_like(y))
    return [y, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@torch.no_grad()
def forward_only(forward: Forward, x: Tensor) -> Tensor:
    return forward(x)


def best_milliseconds(calls: Sequence[Callable[[], object]], repeat: int) -> list[float]:
    best = [float("inf")] * len(calls)
    for _ in range(repeat + 1):
        for i, call in enumerate(calls):
            started = time.perf_counter()
            call()
            best[i] = min(best[i], 1e3 * (time.perf_counter() - started))
    return best


def check(name: str, ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    """Equal within rounding. In bfloat16 another choice of expert for a token whose logits nearly tie is let pass."""
    scale = ours.float().abs().max()
    error = (ours.float() - theirs.float()).abs() / scale
    close = (error < (1e-5 if dtype == torch.float32 else 3e-2)).float().mean()
    if close < (1 if dtype == torch.float32 else 0.98):
        raise AssertionError(f"{name} differs from ours: {1 - close:.1%} of the values, by up to {error.max():.1g}")


def measure(shape: tuple[int, ...], dtype: torch.dtype, repeat: int) -> list[float]:
    """Milliseconds of (transformers, loop, ours) for forward, then the same for forward and backward."""
    N, C, I, E, k = shape
    torch.manual_seed(0)
    moe = MoE(0, hidden_size=C, intermediate_size=I, num_experts=E, num_experts_per_tok=k)
    block = of_transformers(moe, dtype)
    set_compute_dtype(moe, dtype)
    x = torch.randn(N, C, requires_grad=True)
    theirs_x = x.detach().to(dtype).requires_grad_()
    ways: list[tuple[str, Forward, list[Tensor], Tensor]] = [
        ("transformers", lambda x: block(x[None])[0], [theirs_x, *block.parameters()], theirs_x),
        ("loop", partial(loop, moe), [x, *moe.parameters()], x),
        ("ours", partial(ours, moe), [x, *moe.parameters()], x),
    ]
    *others, (_, forward, leaves, _) = ways
    found = step(forward, leaves, x)
    for name, other, their_leaves, their_x in others:
        outputs = step(other, their_leaves, their_x)
        check(name, found[0], outputs[0], dtype)
        check(f"gradient of {name}", found[1], outputs[1], dtype)
    # Forward alone is inference: weights in `dtype` for all, and ours packed as the engine has them.
    cast_moe = copy.deepcopy(moe).to(dtype)
    served = cast(MoE, pack(cast_moe)) if kernels.available() else cast_moe
    x = theirs_x.detach()
    forwards = [partial(forward_only, way, x) for way in (ways[0][1], partial(loop, cast_moe), partial(ours, served))]
    check("the packed block", found[0], forwards[2](), dtype)
    taken = best_milliseconds(forwards, repeat)
    return taken + best_milliseconds([partial(step, way, leaves, x) for _, way, leaves, x in ways], repeat)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("--only-experts", type=int, help="only the sizes with so many experts")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    print(f"milliseconds, {args.threads} thread(s), best of {args.repeat}: transformers' loop / careful loop / ours")
    print("| tokens | hidden | expert | experts | a token | dtype | forward | times | forward and backward | times |")
    print("| ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |")
    for shape in SHAPES:
        if args.only_experts not in (None, shape[3]):
            continue
        for dtype in (torch.float32, torch.bfloat16):
            taken = measure(shape, dtype, args.repeat)
            cells = [*map(str, shape), str(dtype).removeprefix("torch.")]
            for theirs, hand, ours in (taken[:3], taken[3:]):
                cells += [f"{theirs:.2f} / {hand:.2f} / {ours:.2f}", f"{theirs / ours:.1f}, {hand / ours:.1f}"]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
