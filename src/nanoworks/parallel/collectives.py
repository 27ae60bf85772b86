"""Collectives that gradients flow through, for blocks that several ranks compute together.

Each is a pair: what forward does and what its gradient needs. Ranks of a group hold either the same tensor ("whole") or
an equal share of its tokens along dimension `dim`; a gradient is either whole or partial, that is to be summed.
(https://arxiv.org/abs/1909.08053, https://arxiv.org/abs/2205.05198)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function


def copy_in(x: Tensor, group: Any) -> Tensor:
    """The same tensor into a block whose ranks each compute a part: its gradients are summed."""
    return _CopyIn.apply(x, group)


def sum_out(x: Tensor, group: Any) -> Tensor:
    """The sum of what the ranks of a block computed."""
    return _SumOut.apply(x, group)


def gather_in(x: Tensor, group: Any, dim: int, *, partial: bool) -> Tensor:
    """All tokens from the ranks' shares; `partial` says that gradients are to be summed on their way back."""
    return _GatherIn.apply(x, group, dim, partial)


def sum_scatter_out(x: Tensor, group: Any, dim: int) -> Tensor:
    """This rank's share of the tokens of the sum of what the ranks computed."""
    return _SumScatterOut.apply(x, group, dim)


def share(x: Tensor, group: Any, dim: int) -> Tensor:
    """This rank's share of the tokens of a tensor that all have."""
    return _Share.apply(x, group, dim)


def exchange(x: Tensor, group: Any) -> Tensor:
    """Equal parts of `x` along dimension 0, the first to rank 0, the next to rank 1, ...; returned by where from."""
    return _Exchange.apply(x, group)


def all_reduced(x: Tensor, group: Any) -> Tensor:
    """The sum over ranks, out of place and without a gradient."""
    x = x.contiguous().clone()
    dist.all_reduce(x, group=group)
    return x


def gathered(x: Tensor, group: Any, dim: int) -> Tensor:
    """Shares of all ranks along `dim`, without a gradient."""
    parts = x.movedim(dim, 0).contiguous()
    n = dist.get_world_size(group)
    whole = parts.new_empty(n * parts.size(0), *parts.shape[1:])
    dist.all_gather_into_tensor(whole, parts, group=group)
    return whole.movedim(0, dim)


def exchanged(x: Tensor, group: Any) -> Tensor:
    """The same without a gradient."""
    x = x.contiguous()
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x, group=group)
    return received


def _own(x: Tensor, group: Any, dim: int) -> Tensor:
    return x.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)].contiguous()


def _sum_scattered(x: Tensor, group: Any, dim: int) -> Tensor:
    whole = x.movedim(dim, 0).contiguous()
    part = whole.new_empty(whole.size(0) // dist.get_world_size(group), *whole.shape[1:])
    dist.reduce_scatter_tensor(part, whole, group=group)
    return part.movedim(0, dim)


class _CopyIn(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return all_reduced(grad, ctx.group), None


class _SumOut(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        return all_reduced(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None


class _GatherIn(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, dim: int, partial: bool) -> Tensor:
        ctx.group, ctx.dim, ctx.partial = group, dim, partial
        return gathered(x, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        back = _sum_scattered if ctx.partial else _own
        return back(grad, ctx.group, ctx.dim), None, None, None


class _SumScatterOut(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _sum_scattered(x, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return gathered(grad, ctx.group, ctx.dim), None, None


class _Share(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return _own(x, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return gathered(grad, ctx.group, ctx.dim), None, None


class _Exchange(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return exchanged(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return exchanged(grad, ctx.group), None
