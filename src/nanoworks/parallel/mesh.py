"""Which rank does what: the degrees of a recipe laid over the world that torchrun started.

World = pipeline * replicate * shard * context * tensor, the last the closest neighbours, because tensor ranks talk
most and pipeline stages least. Context ranks hold a share of each row of the same data, and parameters are sharded over
them as over the data ranks: for FSDP2 `shard * context` is one dimension. Expert ranks are no further dimension but
neighbours among the data ranks: each has its own rows, and of the experts a share.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from nanoworks.common.errors import UserError
from nanoworks.config.parallel import ParallelSection

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

ORDER = ("pipeline", "replicate", "shard", "context", "tensor")


@dataclass(frozen=True)
class Degrees:
    """Ranks along each dimension."""

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1

    @property
    def world(self) -> int:
        return math.prod(getattr(self, name) for name in ORDER)

    @property
    def data(self) -> int:
        """Ranks that read different rows."""
        return self.replicate * self.shard

    @property
    def same_experts(self) -> tuple[int, int]:
        """(replicate, shard): how the data ranks that have the same share of the experts spread it further."""
        shard = max(1, self.shard // self.expert)
        return self.data // self.expert // shard, shard

    def __str__(self) -> str:
        return " ".join(f"{name}={getattr(self, name)}" for name in (*ORDER, "expert") if getattr(self, name) > 1)


def world_size() -> int:
    """Ranks that torchrun (or another launcher) started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def degrees(section: ParallelSection, world: int) -> Degrees:
    """The section's degrees in a world of so many ranks.

    Raises:
        UserError: their product is not the world; the message lists what would fit.
    """
    fixed = section.pipeline * section.replicate * section.context * section.tensor
    shard = section.shard if section.shard > 0 else world // fixed
    found = Degrees(section.pipeline, section.replicate, shard, section.context, section.tensor, section.expert)
    if shard < 1 or found.world != world:
        asked = " ".join(f"{name}={getattr(section, name)}" for name in ORDER)
        choices = "\n".join(f"  {d}" for d in valid_meshes(section, world))
        raise UserError(f"parallel: {asked} does not make {world} ranks; the meshes of {world} are\n{choices}")
    fits = [n for n in range(1, found.data + 1) if found.data % n == 0 and (shard % n == 0 or n % shard == 0)]
    if found.expert not in fits:
        raise UserError(
            f"parallel.expert={found.expert} does not fit replicate={found.replicate} shard={shard}, out of whose "
            f"ranks it is taken; use one of {', '.join(map(str, fits))}"
        )
    return found


def valid_meshes(section: ParallelSection, world: int) -> Iterator[Degrees]:
    """Every way to fill a world with the dimensions that the section uses; replicate and shard are always free."""
    free = {name for name in ORDER if getattr(section, name) > 1} | {"replicate", "shard"}

    def fill(names: tuple[str, ...], left: int, chosen: dict[str, int]) -> Iterator[Degrees]:
        if not names:
            if left == 1:
                yield Degrees(**chosen)
            return
        for n in range(1, left + 1) if names[0] in free else (1,):
            if left % n == 0:
                yield from fill(names[1:], left // n, {**chosen, names[0]: n})

    yield from fill(ORDER, world, {})


@dataclass
class Mesh:
    """This process among the others. The one without arguments is a process by itself."""

    rank: int = 0
    world_size: int = 1
    data_rank: int = 0
    """Which rows this rank reads: what the loader takes."""
    data_world_size: int = 1
    degrees: Degrees = field(default_factory=Degrees)
    device_mesh: DeviceMesh | None = None
    """Dimensions pipeline, replicate, shard (which is shard * context) and tensor."""
    context_mesh: DeviceMesh | None = None
    """The same ranks as pipeline, replicate, shard, context and tensor, where there are context ranks."""
    expert_mesh: DeviceMesh | None = None
    """The same ranks as pipeline, replicate, shard and expert, where there are expert ranks."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def __getitem__(self, name: str | tuple[str, ...]) -> DeviceMesh:
        """The part of `device_mesh` along one dimension or several."""
        assert self.device_mesh is not None
        return self.device_mesh[name]

    def of_experts(self, *names: str) -> DeviceMesh:
        """The part of `expert_mesh` along these dimensions, "replicate" left out where it is 1."""
        assert self.expert_mesh is not None
        kept = tuple(name for name in names if name != "replicate" or self.degrees.same_experts[0] > 1)
        return self.expert_mesh[kept if len(kept) > 1 else kept[0]]

    def groups(self, name: str) -> Any:
        """The process group along one dimension, context included."""
        mesh = self.context_mesh if name == "context" else self.device_mesh
        assert mesh is not None
        return mesh.get_group(name)


def build_mesh(found: Degrees, device: torch.device) -> Mesh:
    """The mesh of the running process group, which must have `found.world` ranks. Every rank must call this."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    d = found
    names = ("pipeline", "replicate", "shard", "tensor")
    mesh = init_device_mesh(device.type, (d.pipeline, d.replicate, d.shard * d.context, d.tensor), mesh_dim_names=names)
    context = None
    if d.context > 1:
        context = init_device_mesh(device.type, tuple(getattr(d, n) for n in ORDER), mesh_dim_names=ORDER)
    expert = None
    if d.expert > 1:
        sizes = (d.pipeline, *d.same_experts, d.expert)
        expert = init_device_mesh(device.type, sizes, mesh_dim_names=("pipeline", "replicate", "shard", "expert"))
    data_rank = mesh.get_local_rank("replicate") * d.shard + mesh.get_local_rank("shard") // d.context
    return Mesh(dist.get_rank(), d.world, data_rank, d.data, d, mesh, context, expert)
