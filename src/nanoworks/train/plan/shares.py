"""How much of a model each rank holds: parameters cut by tensor, expert and pipeline ranks, then sharded by FSDP2.

The same cuts as `parallel.native` makes, on paper; a test shards real (meta) models over fake groups of up to 256 ranks
and compares.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from nanoworks.config.parallel import ParallelSection
from nanoworks.models import Decoder
from nanoworks.nn.linear import GroupedLinear
from nanoworks.parallel.mesh import Degrees
from nanoworks.parallel.tensor import planned


@dataclass(frozen=True)
class Part:
    """What the rank that holds most of a parameter has of it."""

    name: str
    where: int | None
    """Its layer; None: around them."""
    matrix: bool
    """The optimizer treats it as a matrix inside the layers."""
    size: int
    """Elements it keeps."""
    gathered: int
    """Elements when FSDP2 has gathered it: its share by tensor, expert and pipeline ranks."""


def parts(model: Decoder, degrees: Degrees, section: ParallelSection) -> list[Part]:
    """The parts of all parameters of `model`, which may be on the meta device; pipeline stages are told by `where`."""
    plan = planned(model) if degrees.tensor > 1 else {}
    matrices = {name for role, g in model.param_groups().items() if role.startswith("matrix") for name, _ in g}
    grouped = {name for name, m in model.named_modules() if isinstance(m, GroupedLinear)}
    sharding = degrees.shard * degrees.context
    found = []
    for name, parameter in model.named_parameters():
        leaf, _, kind = name.rpartition(".")
        shape = list(parameter.shape)
        ranks = sharding
        if leaf in grouped and degrees.expert > 1:
            shape[0] //= degrees.expert
            ranks = max(1, sharding * degrees.tensor // degrees.expert)
        elif (style := plan.get(leaf)) is not None:
            if kind == "weight":
                shape[(0 if style == "colwise" else 1) + (leaf in grouped)] //= degrees.tensor
            elif style == "colwise":
                shape[0] //= degrees.tensor
        elif section.loss_parallel and leaf in ("embed_tokens", "head.lm_head"):
            shape[0] //= degrees.tensor
        whole = math.prod(shape)
        kept = whole if ranks == 1 or not shape else math.ceil(shape[0] / ranks) * (whole // shape[0])
        layer = int(name.split(".")[1]) if name.startswith("layers.") else None
        found.append(Part(name, layer, name in matrices, kept, whole))
    return found


def of_stage(found: list[Part], layers: range, *, first: bool, last: bool) -> Iterator[Part]:
    """Those of `parts` that a pipeline stage holds: its layers, with the embedding or the head at the ends."""
    for part in found:
        if part.where is None:
            if (last and part.name.startswith("head.")) or (first and not part.name.startswith("head.")):
                yield part
        elif part.where in layers:
            yield part
