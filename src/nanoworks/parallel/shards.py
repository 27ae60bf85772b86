"""A parameter of which each rank holds a part is a DTensor; these few functions are all that the rest needs of it.

They leave a plain tensor as it is and do not import DTensor, which takes a second that one device need not spend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is spread over ranks (some may hold all of it)."""
    return hasattr(tensor, "placements")


@torch.no_grad()
def local(tensor: Any) -> Tensor:
    """This rank's part: the memory itself, not a copy."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def as_part_of(whole: Any, part: Tensor) -> Tensor:
    """`part` as this rank's part of a tensor that is spread as `whole` is."""
    if not is_sharded(whole):
        return part
    from torch.distributed.tensor import DTensor

    shape, stride = whole.shape, whole.stride()
    return DTensor.from_local(part, whole.device_mesh, whole.placements, run_check=False, shape=shape, stride=stride)


@torch.no_grad()
def full(tensor: Any) -> Tensor:
    """The whole tensor. Every rank that holds a part must call this, in the same order for several."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


@torch.no_grad()
def assign(own: Any, whole: Tensor) -> None:
    """Copy into `own` what belongs to this rank of a whole tensor that every rank has."""
    local(own).copy_(part_of(own, whole))


@torch.no_grad()
def part_of(own: Any, whole: Tensor) -> Tensor:
    """What this rank holds of `whole`, spread as `own` is; every rank has the whole, so nothing is sent."""
    if not is_sharded(own):
        return whole
    from torch.distributed.tensor import distribute_tensor

    on_device = whole.contiguous().to(own.device_mesh.device_type)
    part = distribute_tensor(on_device, own.device_mesh, own.placements, src_data_rank=None)
    return local(part).to(local(own).device)


def copies(tensor: Any, ranks: int) -> int:
    """How many of `ranks` ranks that have a part of `tensor` hold the same part."""
    for mesh_dim in cuts(tensor):
        ranks //= tensor.device_mesh.size(mesh_dim)
    return ranks


def cuts(tensor: Any) -> dict[int, int]:
    """Dimension of the mesh -> dimension of `tensor` that is cut along it (negative: from the last).

    Where FSDP2 cuts what tensor parallelism has cut already, torch's placement is no plain `Shard`.
    """
    placements = enumerate(getattr(tensor, "placements", ()))
    return {
        i: p.dim - tensor.ndim if p.dim >= 0 else p.dim
        for i, p in placements
        if hasattr(p, "dim") and tensor.device_mesh.size(i) > 1
    }


def even_cuts(shape: Sequence[int], ranks: int) -> list[int]:
    """The dimensions along which FSDP2 may cut a parameter of `shape` so that ranks get about as much as each other.

    A matrix or a vector is cut by rows, which may be uneven. Of a stack of experts (E, rows, cols) that would leave
    ranks without any when there are more of them than experts: along the other dimensions, too, ranks get equal parts.
    """
    even = [dim for dim in range(len(shape)) if len(shape) == 3 and shape[dim] % ranks == 0]
    return even or [0]
