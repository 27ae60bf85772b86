"""Expert parallelism: each rank holds some experts of every layer, and tokens travel to the experts chosen for them.

Routing stays where the tokens are: every rank's router sees its own, so capacities, drops, losses and metrics are those
of its micro-batch, as under data parallelism. Rows are sorted by expert, sent by an all-to-all with as many rows for
each rank as it gets, computed there by the code of one device, and sent back (https://arxiv.org/abs/2006.16668). A
block that every token passes besides is computed while they travel.

The weights are DTensors cut along the experts, which FSDP2 may cut further over the ranks that have the same experts.

Shapes: N tokens of this rank, k experts a token, C features, E experts on W ranks, M rows that came to this rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from nanoworks.common.errors import UserError
from nanoworks.models import Decoder
from nanoworks.nn import functional as NF
from nanoworks.nn.linear import GroupedLinear
from nanoworks.nn.moe import Experts, MoE
from nanoworks.parallel.tensor_training import distributed, local_part

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def split_experts(model: Decoder, mesh: DeviceMesh) -> None:
    """Spread the experts of `model` in place over the ranks of the one-dimensional `mesh`; all hold all of them before.

    Raises:
        UserError: there are no experts, or `mesh.size()` does not divide their number.
    """
    n = mesh.size()
    mixtures = [module for module in model.modules() if isinstance(module, MoE)]
    if not mixtures:
        raise UserError(
            f"parallel.expert={n}: the model is a {model.config.model_type}, which has no experts; use parallel.shard"
        )
    for number in {mixture.num_experts for mixture in mixtures}:
        if number % n:
            fits = ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
            raise UserError(f"parallel.expert={n} does not divide the {number} experts of a layer; use one of {fits}")
    for mixture in mixtures:
        experts: Any = mixture.experts
        for leaf in (experts.gate_proj, experts.up_proj, experts.down_proj):
            leaf.weight = distributed(leaf.weight, mesh, 0)
            leaf.num_experts //= n
            # The class changes in place, as in tensor_training: names, hooks and the identity of the module stay.
            leaf.__class__ = _Part
            leaf.ranks = n
        experts.__class__ = _SpreadExperts
        experts.group, experts.ranks = mesh.get_group(), n


def shard_experts(model: Decoder, options: Mapping[str, Any]) -> None:
    """Make the experts of each layer a unit of FSDP2 over the ranks that have the same of them.

    `options` are `fully_shard`'s, with those ranks as its mesh. With one such rank nothing is sent, and gradients are
    treated as those of all others.
    """
    from torch.distributed.fsdp import fully_shard

    for module in model.modules():
        if isinstance(module, _SpreadExperts):
            fully_shard(module, **options)


@dataclass(frozen=True)
class _Sent:
    """Rows on their way."""

    rows: Tensor
    """(M, C) those that come to this rank; the first operation on them waits for them."""
    experts: Tensor
    """(M, 1) for which of this rank's experts."""
    order: Tensor
    """The choices (of N * k) that were sent, in the order of their experts."""
    gave: list[int]
    """How many rows went to each rank."""
    got: list[int]
    """How many came from each."""


class _SpreadExperts(Experts):
    """torch.compile leaves it out: how many rows come is known only when they come."""

    group: Any
    ranks: int

    @torch.compiler.disable
    def send(self, x: Tensor, experts: Tensor, drop: Tensor | None = None) -> _Sent:
        own = self.gate_proj.num_experts
        total = own * self.ranks
        if drop is not None:
            experts = experts.masked_fill(drop, total)  # after all others
        choices = experts.flatten()
        order = choices.argsort(stable=True)
        counts = choices.new_zeros(total + 1).scatter_add_(0, choices, torch.ones_like(choices))[:total]
        come = torch.empty_like(counts)  # from each rank for each own expert
        torch.distributed.all_to_all_single(come, counts, group=self.group)
        gave, got = torch.stack([counts, come]).view(2, self.ranks, own).sum(-1).tolist()
        order = order[: sum(gave)]
        rows = x.to(self.gate_proj.compute_dtype or x.dtype).index_select(0, order // experts.size(1))
        numbers = torch.arange(own, device=x.device).repeat(self.ranks)
        theirs = numbers.repeat_interleave(come, output_size=sum(got)).unsqueeze(1)
        return _Sent(_exchange(rows, got, gave, self.group), theirs, order, gave, got)

    @torch.compiler.disable
    def forward(
        self, x: Tensor, weights: Tensor, experts: Tensor, drop: Tensor | None = None, sent: _Sent | None = None
    ) -> Tensor:
        sent = sent or self.send(x, experts, drop)
        rows, theirs = sent.rows, sent.experts
        if not len(theirs):  # a product over no rows fails on some GPUs (pytorch#192497): one of zeros, nobody's
            rows, theirs = F.pad(rows, (0, 0, 0, 1)), theirs.new_zeros(1, 1)
        ones = torch.ones(len(theirs), 1, dtype=rows.dtype, device=rows.device)
        y = super().forward(rows, ones, theirs)[: len(sent.experts)]
        y = _exchange(y, sent.gave, sent.got, self.group)
        y = y * weights.flatten()[sent.order, None]
        return torch.zeros_like(x).index_add(0, sent.order // experts.size(1), y.to(x.dtype))


class _Part(GroupedLinear):
    """This rank's experts. Tokens of all expert ranks come to them, so that their gradient is a sum over these, and the
    data ranks that FSDP2 averages over are fewer by as many: the gradient is divided by the number of expert ranks."""

    ranks: int

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        dtype = self.compute_dtype or x.dtype
        weight: Tensor = _DivideGradient.apply(local_part(self.weight), self.ranks)
        return NF.grouped_linear(x.to(dtype), weight.to(dtype), ends)


def _exchange(rows: Tensor, receive: list[int], give: list[int], group: Any) -> Tensor:
    """Give the first `give[0]` rows to rank 0, the next to rank 1, ...; `receive` says how many come from each."""
    from torch.distributed._functional_collectives import all_to_all_single_autograd

    received: Tensor = all_to_all_single_autograd(rows.contiguous(), receive, give, group)
    return received


class _DivideGradient(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, by: int) -> Tensor:
        ctx.by = by
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad / ctx.by, None
