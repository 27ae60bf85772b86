"""Tensors by name from all ranks of a pipeline to all of them: for saving a model, or making a whole one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather(
    tensors: Mapping[str, Tensor],
    group: dist.ProcessGroup,
    device: torch.device,
    *,
    full: Callable[[Tensor], Tensor],
    order: Sequence[str] = (),
) -> Iterator[tuple[str, Tensor]]:
    """Give every rank of `group` the tensors of all, one at a time; of those with one name the first rank's.

    Args:
        full: makes a tensor whole that is sharded over ranks of other dimensions, which must call this as well.
        order: names that come first, in this order; the others follow by rank.

    Tensors on the meta device come as that, their shape and dtype only.
    """
    known: list[Any] = [None] * dist.get_world_size(group)
    mine = {name: (tuple(tensor.shape), tensor.dtype, tensor.is_meta) for name, tensor in tensors.items()}
    dist.all_gather_object(known, mine, group=group)
    found: dict[str, tuple[int, Any]] = {}
    for rank, theirs in enumerate(known):
        for name, what in theirs.items():
            found.setdefault(name, (rank, what))
    first = [name for name in order if name in found]
    for name in dict.fromkeys([*first, *found]):
        rank, (shape, dtype, is_meta) = found[name]
        if is_meta:
            yield name, torch.empty(shape, dtype=dtype, device="meta")
        else:
            own = full(tensors[name]).to(device).contiguous() if rank == dist.get_rank(group) else None
            tensor = torch.empty(shape, dtype=dtype, device=device) if own is None else own
            dist.broadcast(tensor, group_src=rank, group=group)
            yield name, tensor
