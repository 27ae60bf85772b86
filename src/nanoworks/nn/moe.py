"""Mixture of experts: a router sends each token to a few of many feed-forward blocks.

Tokens are sorted by expert and each projection of all experts is one grouped product; in training on a CPU
`nn.batched_experts` does it. What the router did is left with the context (`ctx.routing`), so that losses and metrics
are made from it outside the model.

Shapes: N tokens, C features, E experts, k experts a token, I features inside an expert; M = N * k rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoworks.nn import batched_experts
from nanoworks.nn.context import ForwardContext
from nanoworks.nn.linear import GroupedLinear, Linear


@dataclass(frozen=True)
class Routing:
    """What one layer's router did with a batch."""

    logits: Tensor
    """(N, E) float32, with gradient; -inf for an expert that was closed."""
    experts: Tensor
    """(N, k) chosen experts."""
    overflow: Tensor
    """Scalar count of the N * k choices beyond an expert's capacity."""
    dropped: Tensor
    """How many of them were dropped."""
    closed: Tensor | None = None
    """(E,) experts that could not be chosen."""

    @property
    def counts(self) -> Tensor:
        """(E,) float32, how many times each expert was chosen."""
        return self.counts_of(None)

    def counts_of(self, keep: Tensor | None) -> Tensor:
        """The same over the tokens where `keep` (N,) is true (None: all)."""
        experts = self.experts if keep is None else self.experts[keep]
        return _tally(experts.flatten(), self.logits.size(1)).float()


@dataclass(frozen=True)
class TrainingRules:
    """What a router does in training only. Evaluation and serving choose freely among all experts."""

    capacity_factor: float | None = None
    """An expert takes at most `factor * N * k / E` choices, rounded up. None: any number."""
    overflow: Literal["drop", "dropless"] = "drop"
    """What becomes of the choices beyond, which are the last by rank of choice and order of tokens: the token keeps
    what its other experts give, at the least the residual; or they are computed all the same and only counted."""
    expert_dropout: float = 0.0
    """Share of experts closed at random in each pass."""
    top_k: int | None = None
    """Experts a token goes to; None: the model's number."""
    open_experts: int | None = None
    """Only so many first experts can be chosen; None: all."""


AS_BUILT = TrainingRules()


class Experts(nn.Module):
    """E SwiGLU blocks of I features."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = GroupedLinear(num_experts, hidden_size, intermediate_size)
        self.up_proj = GroupedLinear(num_experts, hidden_size, intermediate_size)
        self.down_proj = GroupedLinear(num_experts, intermediate_size, hidden_size)

    def send(self, x: Tensor, experts: Tensor, drop: Tensor | None = None) -> Any:
        """Where other ranks hold experts: begin to send the tokens there. Pass what this gives to `forward`."""
        return None

    def forward(
        self, x: Tensor, weights: Tensor, experts: Tensor, drop: Tensor | None = None, sent: Any = None
    ) -> Tensor:
        """`sum_j weights[n, j] * block(x[n])`, the block being that of expert `experts[n, j]`; (N, C) in x's dtype.

        Args:
            x: (N, C).
            weights, experts: (N, k).
            drop: (N, k), true for choices to leave out.
            sent: what `send` gave for the same.
        """
        leaves = (self.gate_proj, self.up_proj, self.down_proj)
        num_experts = self.gate_proj.num_experts
        if drop is not None:
            experts = experts.masked_fill(drop, num_experts)  # after all others
        if batched_experts.suits(experts.numel(), x, *leaves):
            dtype = self.gate_proj.compute_dtype or x.dtype
            return batched_experts.mixture(x, weights, experts, dtype, *[leaf.weight for leaf in leaves])
        choices = experts.flatten()
        rows = choices.argsort(stable=True)
        ends = _tally(choices, num_experts + 1)[:num_experts].cumsum(0).int()
        if drop is not None:
            rows = rows[: int(ends[-1])]
        source = rows // experts.size(1)
        inputs = x.index_select(0, source)
        h = F.silu(self.gate_proj(inputs, ends)) * self.up_proj(inputs, ends)
        y = self.down_proj(h, ends) * weights.flatten()[rows, None]
        return torch.zeros_like(x).index_add(0, source, y.to(x.dtype))


class MoE(nn.Module):
    """Sparse feed-forward block.

    Args:
        layer: index under which the routing is left with the context.
        num_experts, num_experts_per_tok: E and k.
        normalize: weights of the chosen experts sum to 1.
        softmax_first: weights are the softmax over all experts; False: over the chosen ones alone.
        selection_bias: a bias for each expert counts in the choice but not in the weights. It has no gradient: training
            moves it (`train.experts`) so that all experts are used (https://arxiv.org/abs/2408.15664).
        shared: a feed-forward block that every token passes besides.

    `rules` may be replaced at any time and hold in training only.
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
        selection_bias: bool = False,
        shared: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.layer, self.num_experts, self.top_k = layer, num_experts, num_experts_per_tok
        self.normalize, self.softmax_first = normalize, softmax_first
        self.gate = Linear(hidden_size, num_experts, bias=False)
        self.experts = Experts(num_experts, hidden_size, intermediate_size)
        self.shared = shared
        self.e_score_correction_bias: nn.Parameter | None = None
        self.rules = AS_BUILT
        if selection_bias:
            self.add_selection_bias()

    def add_selection_bias(self) -> None:
        """Begin to choose with a bias, of zeros."""
        bias = torch.zeros(self.num_experts, device=self.gate.weight.device)
        self.e_score_correction_bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """(..., C) -> (..., C)."""
        rules = self.rules if self.training else AS_BUILT
        top_k = rules.top_k or self.top_k
        tokens = x.flatten(0, -2)
        logits = self.gate(tokens).float()
        closed = self._closed(rules, top_k, logits.device)
        if closed is not None:
            logits = logits.masked_fill(closed, -math.inf)
        weights, experts = self.choose(logits, top_k)
        over = None if rules.capacity_factor is None else self._over_capacity(experts, rules.capacity_factor)
        drop = over if rules.overflow == "drop" else None
        if ctx.routing is not None:
            none = experts.new_zeros(())
            ctx.routing[self.layer] = Routing(
                logits,
                experts,
                overflow=none if over is None else over.sum(),
                dropped=none if drop is None else drop.sum(),
                closed=closed,
            )
        sent = self.experts.send(tokens, experts, drop)
        shared = None if self.shared is None else self.shared(tokens)  # while they travel
        y = self.experts(tokens, weights, experts, drop, sent)
        return (y if shared is None else y + shared).view_as(x)

    def choose(self, logits: Tensor, top_k: int | None = None) -> tuple[Tensor, Tensor]:
        """(N, E) logits -> weights (N, k) float32 and experts (N, k), the likeliest first."""
        scores = logits.softmax(-1) if self.softmax_first else logits
        preference = scores
        if self.e_score_correction_bias is not None:
            preference = (scores + self.e_score_correction_bias).masked_fill(logits == -math.inf, -math.inf)
        experts = preference.topk(top_k or self.top_k, dim=-1).indices
        chosen = scores.gather(-1, experts)
        if not self.softmax_first:
            return chosen.softmax(-1), experts
        if not self.normalize:
            return chosen, experts
        return chosen / chosen.sum(-1, keepdim=True).clamp(min=torch.finfo(chosen.dtype).tiny), experts

    def _closed(self, rules: TrainingRules, top_k: int, device: torch.device) -> Tensor | None:
        """(E,) experts that must not be chosen in this pass; k of them are always left."""
        if not rules.expert_dropout and rules.open_experts is None:
            return None
        draw = torch.rand(self.num_experts, device=device)
        draw[max(rules.open_experts or self.num_experts, top_k) :] = -1.0
        closed = draw < rules.expert_dropout
        closed[draw.topk(top_k).indices] = False
        return closed

    def _over_capacity(self, experts: Tensor, factor: float) -> Tensor:
        """Which choices (N, k) an expert has no room for. All first choices come before all second ones."""
        capacity = math.ceil(factor * experts.numel() / self.num_experts)
        flat = experts.t().flatten()
        order = flat.argsort(stable=True)
        counts = _tally(flat, self.num_experts)
        begins = (counts.cumsum(0) - counts)[flat[order]]
        place = torch.empty_like(order)  # how many earlier choices there are of the same expert
        place[order] = torch.arange(flat.numel(), device=flat.device) - begins
        return (place >= capacity).view(experts.size(1), -1).t()


def _tally(choices: Tensor, n: int) -> Tensor:
    """(n,) how often each of 0 .. n - 1 is in `choices`; unlike bincount it does not wait for a GPU."""
    return choices.new_zeros(n).scatter_add_(0, choices, torch.ones_like(choices))


def load_balancing_loss(routings: Iterable[Routing], keep: Tensor | None = None) -> Tensor:
    """The Switch Transformer's loss over all layers together: E * sum_e (share of choices) * (mean probability).

    1 for each expert a token chooses when routing is even (https://arxiv.org/abs/2101.03961, equations 4 to 6, with the
    counts and probabilities of all layers taken together as transformers does). Where experts are closed, E is the
    number of open ones. Only tokens where `keep` (N,) is true count; 0 without any.
    """
    routings = list(routings)
    counts = torch.stack([r.counts_of(keep) for r in routings]).sum(0)
    kept = [r.logits if keep is None else r.logits[keep] for r in routings]
    rows = max(1, sum(logits.size(0) for logits in kept))
    probabilities = torch.stack([logits.softmax(-1).sum(0) for logits in kept]).sum(0)
    closed = sum((r.closed.sum() for r in routings if r.closed is not None), counts.new_zeros(()))
    num_open = counts.size(0) - closed / len(routings)
    return num_open * (counts / rows * probabilities / rows).sum()


def router_z_loss(routings: Iterable[Routing], keep: Tensor | None = None) -> Tensor:
    """Mean squared log of the softmax's denominator: keeps logits small (https://arxiv.org/abs/2202.08906)."""
    kept = [r.logits if keep is None else r.logits[keep] for r in routings]
    return torch.stack([x.logsumexp(-1).square().sum() / max(1, x.size(0)) for x in kept]).mean()
