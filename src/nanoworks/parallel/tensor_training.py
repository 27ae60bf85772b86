"""Tensor parallelism for training: matrices cut by the family's plan, as DTensors, which FSDP2 and checkpoints know.

The same plan and the same cuts as for inference (`parallel.tensor`): a block (attention, feed-forward, experts) takes
its input on every rank, its colwise leaves give this rank's heads or features, its rowwise leaf gives a part of a sum.
Leaves compute on their local parts with the kernels of a single device; only the four collectives at the borders of a
block are distributed. With `sequence_parallel` what lies between blocks holds a share of each row's tokens
(https://arxiv.org/abs/2205.05198), with `loss_parallel` embedding and head hold a share of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nanoworks.common.errors import UserError
from nanoworks.models import Decoder
from nanoworks.nn import functional as NF
from nanoworks.nn.linear import GroupedLinear, Linear
from nanoworks.nn.moe import MoE
from nanoworks.parallel import collectives as C
from nanoworks.parallel.tensor import check_divisible, planned
from nanoworks.parallel.vocabulary import split_vocabulary

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

TOKENS = 1
"""The dimension of tokens in (B, T, C)."""


def split_matrices(
    model: Decoder, mesh: DeviceMesh, *, sequence_parallel: bool = False, loss_parallel: bool = False
) -> list[str]:
    """Cut `model` in place over the ranks of the one-dimensional `mesh`; all hold the same whole model before.

    Returns:
        The names of whole parameters of which each rank computes a part of the gradient, to be summed over `mesh`.

    Raises:
        UserError: the family has no plan, `mesh.size()` does not divide what has to be divided, or the family does
            something that is not cut here.
    """
    n, group = mesh.size(), mesh.get_group()
    check_divisible(model.config, n)
    plan = planned(model)
    _check_family(model, plan, sequence_parallel)
    for name, style in plan.items():
        _cut(name, model.get_submodule(name), style, mesh, sequence_parallel)
    blocks = {name.rpartition(".")[0] for name, style in plan.items() if style == "colwise"}
    mixtures = [name for name, module in model.named_modules() if isinstance(module, MoE)]
    for name in blocks:
        inside_mixture = any(name.startswith(f"{mixture}.") for mixture in mixtures)
        _border(model.get_submodule(name), group, sequence_parallel and not inside_mixture, sums=inside_mixture)
    if sequence_parallel:
        for name in mixtures:  # its router must see all tokens: capacities and losses are of the whole batch
            _whole_inside(model.get_submodule(name), group)
        model.layers[0].register_forward_pre_hook(lambda _, args: (_shared(args[0], group), *args[1:]))
        model.layers[-1].register_forward_hook(lambda _, __, x: C.gather_in(x, group, TOKENS, partial=False))
    if loss_parallel:
        split_vocabulary(model, mesh)
    return _partial(model, plan, blocks, mixtures, sequence_parallel)


def _check_family(model: Decoder, plan: dict[str, str], sequence_parallel: bool) -> None:
    family = model.config.model_type
    if any(not isinstance(model.get_submodule(name), (Linear, GroupedLinear)) for name in plan):
        raise UserError(f"parallel.tensor does not train a {family}: its plan cuts embeddings too; use parallel.shard")
    if sequence_parallel and type(model).forward is not Decoder.forward:
        raise UserError(f"parallel.sequence_parallel does not know how a {family} passes its layers; leave it out")


def _cut(name: str, leaf: Any, style: str, mesh: DeviceMesh, sequence_parallel: bool) -> None:
    n, grouped = mesh.size(), isinstance(leaf, GroupedLinear)
    size = leaf.out_features if style == "colwise" else leaf.in_features
    if size % n:
        raise UserError(f"parallel.tensor={n} does not divide the {size} features of {name}; take a divisor of {size}")
    dim = (0 if style == "colwise" else 1) + grouped
    leaf.weight = distributed(leaf.weight, mesh, dim)
    if grouped:
        leaf.__class__ = _GroupedPart
        return
    if style == "colwise" and leaf.bias is not None:
        leaf.bias = distributed(leaf.bias, mesh, 0)
    # The class changes in place, as FSDP2's does: names, hooks and the identity of the module stay.
    leaf.__class__ = _ColwisePart if style == "colwise" else _RowwisePart
    group = mesh.get_group()
    if style == "rowwise":
        leaf.combine = (
            (lambda x: C.sum_scatter_out(x, group, TOKENS)) if sequence_parallel else (lambda x: C.sum_out(x, group))
        )


def distributed(parameter: Tensor, mesh: DeviceMesh, dim: int) -> nn.Parameter:
    """`parameter`, which every rank holds whole, cut along `dim`."""
    from torch.distributed.tensor import Shard, distribute_tensor

    cut = distribute_tensor(parameter.detach(), mesh, [Shard(dim)], src_data_rank=None)
    return nn.Parameter(cut, requires_grad=parameter.requires_grad)


def local_part(parameter: Any) -> Tensor:
    """This rank's part of a parameter, through which its gradient flows."""
    return parameter.to_local()


class _ColwisePart(Linear):
    def forward(self, x: Tensor) -> Tensor:
        weight, bias = local_part(self.weight), None if self.bias is None else local_part(self.bias)
        if self.compute_dtype is not None:
            x, weight = x.to(self.compute_dtype), weight.to(self.compute_dtype)
            bias = None if bias is None else bias.to(self.compute_dtype)
        return NF.linear(x, weight, bias)


class _RowwisePart(Linear):
    combine: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.compute_dtype or x.dtype
        y = self.combine(NF.linear(x.to(dtype), local_part(self.weight).to(dtype)))
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _GroupedPart(GroupedLinear):
    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        dtype = self.compute_dtype or x.dtype
        return NF.grouped_linear(x.to(dtype), local_part(self.weight).to(dtype), ends)


def _border(block: nn.Module, group: Any, sequence_parallel: bool, *, sums: bool) -> None:
    """Bring the inputs of `block` in on every rank; with `sums`, add up what its ranks give (else its leaf does)."""

    def enter(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if sequence_parallel:
            return (C.gather_in(args[0], group, TOKENS, partial=True), *args[1:])
        return tuple(C.copy_in(a, group) if torch.is_tensor(a) and a.is_floating_point() else a for a in args)

    block.register_forward_pre_hook(enter)
    if sums:
        block.register_forward_hook(lambda _, __, y: C.sum_out(y, group))


def _whole_inside(mixture: nn.Module, group: Any) -> None:
    mixture.register_forward_pre_hook(lambda _, args: (C.gather_in(args[0], group, TOKENS, partial=False), *args[1:]))
    mixture.register_forward_hook(lambda _, __, y: C.share(y, group, TOKENS))


def _shared(x: Tensor, group: Any) -> Tensor:
    n = torch.distributed.get_world_size(group)
    if x.size(TOKENS) % n:
        raise UserError(
            f"parallel.sequence_parallel: rows of {x.size(TOKENS)} tokens cannot be shared by {n} tensor ranks; take "
            f"a data.sequence_length that is a multiple of {n}"
        )
    return C.share(x, group, TOKENS)


def _partial(
    model: Decoder, plan: dict[str, str], blocks: set[str], mixtures: list[str], sequence_parallel: bool
) -> list[str]:
    """Whole parameters inside a block (norms of heads), or between blocks where tokens are shared."""
    rowwise = tuple(f"{name}." for name, style in plan.items() if style == "rowwise")
    inside = tuple(f"{name}." for name in blocks)
    whole_inside = tuple(f"{name}." for name in mixtures)

    def partial(name: str) -> bool:
        if sequence_parallel:
            return name.startswith("layers.") and not name.startswith(whole_inside)
        return name.startswith(inside) and not name.startswith(rowwise)

    parameters = model.named_parameters()
    return [name for name, p in parameters if not hasattr(p, "placements") and p.requires_grad and partial(name)]
