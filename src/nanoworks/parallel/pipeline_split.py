"""Where a model is cut into pipeline stages: as evenly as its layers' costs allow, embedding and head counted.

A cost is any amount that adds up: FLOPs (`estimated_costs`, which needs no weights) or seconds (`measured_costs`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nanoworks.common.errors import UserError
from nanoworks.models import Decoder
from nanoworks.nn.context import DenseContext
from nanoworks.nn.moe import MoE


@dataclass(frozen=True)
class Costs:
    """What the forward pass of each part of a model costs."""

    embedding: float
    layers: tuple[float, ...]
    head: float

    def stages(self, bounds: Sequence[range]) -> list[float]:
        """The cost of each stage that `split` made."""
        own = [sum(self.layers[i] for i in layers) for layers in bounds]
        own[0] += self.embedding
        own[-1] += self.head
        return own


def estimated_costs(model: Decoder, sequence_length: int) -> Costs:
    """FLOPs a token, forward; attention over the full row or the layer's window, of experts those that work.

    The embedding is a lookup and counts as one pass over its output. The model may be on the meta device.
    """
    c = model.config

    def layer(module: nn.Module) -> float:
        active = sum(p.numel() for p in module.parameters())
        seen = sequence_length
        for child in module.modules():
            if isinstance(child, MoE):
                experts = sum(p.numel() for p in child.experts.parameters())
                active -= experts * (child.num_experts - child.top_k) // child.num_experts
            window: Any = getattr(child, "window", None)
            if window is not None:
                seen = min(seen, window.size)
        return 2.0 * active + 4.0 * c.num_attention_heads * c.head_dim * seen

    return Costs(
        embedding=float(c.hidden_size),
        layers=tuple(layer(module) for module in model.layers),
        head=2.0 * c.hidden_size * c.vocab_size,
    )


def measured_costs(model: Decoder, tokens: Tensor, *, repeats: int = 3) -> Costs:
    """Seconds of forward and backward on `tokens` (B, T) for each part of a whole model: the best of `repeats`.

    Gradients that the parameters had are kept.
    """
    kept = [(p, p.grad) for p in model.parameters()]
    ctx = DenseContext(tokens)
    with torch.no_grad():
        embedded = model.embed(tokens, ctx)
        rotation = model.rope(ctx.positions, ctx.lengths)
    weights = torch.ones(tokens.shape, device=tokens.device)

    def best(run: Callable[[Tensor], Tensor]) -> float:
        seconds = float("inf")
        for _ in range(repeats):
            x = embedded.detach().requires_grad_()
            _wait(tokens.device)
            began = time.perf_counter()
            run(x).sum().backward()
            _wait(tokens.device)
            seconds = min(seconds, time.perf_counter() - began)
        return seconds

    try:
        return Costs(
            embedding=best(lambda x: model.embed(tokens, ctx)),
            layers=tuple(best(lambda x, layer=layer: layer(x, rotation, ctx)) for layer in model.layers),  # type: ignore[misc]
            head=best(lambda x: model.head.loss(x, tokens, weights)),
        )
    finally:
        for parameter, grad in kept:
            parameter.grad = grad


def split(costs: Costs, stages: int) -> list[range]:
    """Cut the layers into `stages` runs of at least one so that the dearest stage is as cheap as can be.

    Among such cuts the one with the least sum of squares is taken, that is the most even one. Returns the layers of
    each stage; the first also has the embedding, the last the head.

    Raises:
        UserError: more stages than layers.
    """
    n = len(costs.layers)
    if stages > n:
        raise UserError(
            f"{stages} pipeline stages need as many layers, and the model has {n}; take at most {n} stages (stages are "
            "parallel.pipeline times the stages that the schedule gives each rank)"
        )
    own = list(costs.layers)
    own[0] += costs.embedding
    own[-1] += costs.head
    total = [0.0]
    for cost in own:
        total.append(total[-1] + cost)
    # best[i] with k stages: the best cut of the first i layers, as (dearest stage, sum of squares, where each begins)
    best = [(cost, cost * cost, [0]) for cost in total]
    for k in range(2, stages + 1):
        longer = [(float("inf"), float("inf"), [0])] * (n + 1)
        for end in range(k, n + 1):
            for begin in range(k - 1, end):
                cost = total[end] - total[begin]
                dearest, squares, begins = best[begin]
                candidate = (max(dearest, cost), squares + cost * cost)
                if candidate < longer[end][:2]:
                    longer[end] = (*candidate, [*begins, begin])
        best = longer
    begins = [*best[n][2], n]
    return [range(begins[k], begins[k + 1]) for k in range(stages)]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
