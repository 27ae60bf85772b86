"""Mixture of experts: a router sends each token to a few of many feed-forward blocks.

Tokens are sorted by expert and each projection of all experts is one grouped product. What the router did is
left with the context (`ctx.routing`), so that losses and metrics are made from it outside the model.

Shapes: N tokens, C features, E experts, k experts a token, I features inside an expert; M = N * k rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoworks.nn.context import ForwardContext
from nanoworks.nn.linear import GroupedLinear, Linear


@dataclass(frozen=True)
class Routing:
    """What one layer's router did with a batch."""

    logits: Tensor
    """(N, E) float32, with gradient."""
    experts: Tensor
    """(N, k) chosen experts."""
    dropped: Tensor
    """Scalar count of the N * k choices that exceeded an expert's capacity."""

    @property
    def counts(self) -> Tensor:
        """(E,) float32, how many times each expert was chosen."""
        return torch.bincount(self.experts.flatten(), minlength=self.logits.size(1)).float()


class Experts(nn.Module):
    """E SwiGLU blocks of I features."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = GroupedLinear(num_experts, hidden_size, intermediate_size)
        self.up_proj = GroupedLinear(num_experts, hidden_size, intermediate_size)
        self.down_proj = GroupedLinear(num_experts, intermediate_size, hidden_size)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x (M, C), sorted by expert; ends (E,) as in GroupedLinear."""
        return self.down_proj(F.silu(self.gate_proj(x, ends)) * self.up_proj(x, ends), ends)


class MoE(nn.Module):
    """Sparse feed-forward block.

    Args:
        layer: index under which the routing is left with the context.
        num_experts, num_experts_per_tok: E and k.
        normalize: weights of the chosen experts sum to 1.
        softmax_first: weights are the softmax over all experts; False: over the chosen ones alone.
        capacity_factor: in training, an expert takes at most `factor * N * k / E` choices; those beyond it, by
            order of tokens, are dropped: the token keeps what its other experts give, at the least the residual.
            None never drops.
        shared: a feed-forward block that every token passes besides.
    """

    def __init__(
        self,
        layer: int,
        *,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        num_experts_per_tok: int,
        normalize: bool = True,
        softmax_first: bool = True,
        capacity_factor: float | None = None,
        shared: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.layer, self.top_k = layer, num_experts_per_tok
        self.normalize, self.softmax_first, self.capacity_factor = normalize, softmax_first, capacity_factor
        self.gate = Linear(hidden_size, num_experts, bias=False)
        self.experts = Experts(num_experts, hidden_size, intermediate_size)
        self.shared = shared

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """(..., C) -> (..., C)."""
        tokens = x.flatten(0, -2)
        logits = self.gate(tokens).float()
        weights, experts = self.choose(logits)
        taken, dropped = self._within_capacity(experts, logits.size(1))
        if ctx.routing is not None:
            ctx.routing[self.layer] = Routing(logits, experts, dropped)
        y = self._dispatch(tokens, weights, experts, taken)
        if self.shared is not None:
            y = y + self.shared(tokens)
        return y.view_as(x)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(N, E) logits -> weights (N, k) float32 and experts (N, k), the likeliest first."""
        if not self.softmax_first:
            chosen, experts = logits.topk(self.top_k, dim=-1)
            return chosen.softmax(-1), experts
        weights, experts = logits.softmax(-1).topk(self.top_k, dim=-1)
        return (weights / weights.sum(-1, keepdim=True) if self.normalize else weights), experts

    def _within_capacity(self, experts: Tensor, num_experts: int) -> tuple[Tensor | None, Tensor]:
        """Which choices (N, k) an expert has room for (None: all), and how many it has not."""
        none = torch.zeros((), dtype=torch.long, device=experts.device)
        if self.capacity_factor is None or not self.training:
            return None, none
        capacity = max(1, int(self.capacity_factor * experts.numel() / num_experts))
        # All first choices come before all second ones; a choice's place is the number of the same before it.
        ordered = F.one_hot(experts.t().flatten(), num_experts)
        place = (ordered.cumsum(0) * ordered).sum(-1).view(experts.size(1), -1).t()
        taken = place <= capacity
        return taken, (~taken).sum()

    def _dispatch(self, tokens: Tensor, weights: Tensor, experts: Tensor, taken: Tensor | None) -> Tensor:
        num_experts = self.experts.gate_proj.num_experts
        flat = experts.flatten()
        if taken is not None:
            flat = torch.where(taken.flatten(), flat, num_experts)  # after all others
        order = flat.argsort(stable=True)
        ends = torch.bincount(flat, minlength=num_experts)[:num_experts].cumsum(0).int()
        rows = order[: int(ends[-1])] if taken is not None else order
        source = rows // self.top_k
        y = self.experts(tokens[source], ends)
        y = y * weights.flatten()[rows, None]
        return torch.zeros_like(tokens).index_add(0, source, y.to(tokens.dtype))


def load_balancing_loss(routings: Iterable[Routing]) -> Tensor:
    """The Switch Transformer's loss over all layers together: E * sum_e (share of choices) * (mean probability).

    1 for each expert a token chooses when routing is even (https://arxiv.org/abs/2101.03961, equations 4 to 6, with the
    counts and probabilities of all layers taken together as transformers does).
    """
    routings = list(routings)
    rows = sum(r.logits.size(0) for r in routings)
    counts = torch.stack([r.counts for r in routings]).sum(0) / rows
    probabilities = torch.stack([r.logits.softmax(-1).sum(0) for r in routings]).sum(0) / rows
    return counts.size(0) * (counts * probabilities).sum()


def router_z_loss(routings: Iterable[Routing]) -> Tensor:
    """Mean squared log of the softmax's denominator: keeps logits small (https://arxiv.org/abs/2202.08906)."""
    return torch.stack([r.logits.logsumexp(-1).square().mean() for r in routings]).mean()
