"""How much of a model each rank holds: parameters cut by tensor, expert and pipeline ranks, then sharded by FSDP2.

The same cuts as `parallel.native` makes, on paper; a test shards real (meta) models over fake groups of up to 256 ranks
and compares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from nanoworks.config.parallel import ParallelSection
from nanoworks.models import Decoder
from nanoworks.nn.linear import GroupedLinear
from nanoworks.parallel.mesh import Degrees
from nanoworks.parallel.pipeline_split import estimated_costs, split
from nanoworks.parallel.shards import even_cuts
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
    return list(_parts(model, replace(degrees, pipeline=1), section.loss_parallel))


@lru_cache(maxsize=64)  # a plan asks for the same ones many times
def _parts(model: Decoder, degrees: Degrees, loss_parallel: bool) -> tuple[Part, ...]:
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
        elif loss_parallel and leaf in ("embed_tokens", "head.lm_head"):
            shape[0] //= degrees.tensor
        whole = math.prod(shape)
        dim = even_cuts(shape, ranks)[0]
        kept = whole if ranks == 1 or not shape else math.ceil(shape[dim] / ranks) * (whole // shape[dim])
        layer = int(name.split(".")[1]) if name.startswith("layers.") else None
        found.append(Part(name, layer, name in matrices, kept, whole))
    return tuple(found)


@lru_cache(maxsize=64)
def cut(model: Decoder, stages: int) -> tuple[range, ...]:
    """The layers of each pipeline stage, as `parallel.pipeline` cuts the model.

    Raises:
        UserError: more stages than layers.
    """
    return tuple(split(estimated_costs(model, model.config.max_position_embeddings), stages))


def stages_of_ranks(schedule: str, ranks: int) -> list[list[int]]:
    """The pipeline stages of each rank of a pipeline."""
    if ranks == 1:
        return [[0]]
    from nanoworks.parallel.pipeline_schedule import rank_of, stages_per_rank  # torch's pipelining imports for a second

    numbers = range(ranks * stages_per_rank(schedule, None))
    return [[stage for stage in numbers if rank_of(schedule, stage, ranks) == rank] for rank in range(ranks)]


def by_stage(model: Decoder, degrees: Degrees, section: ParallelSection, bounds: Sequence[range]) -> list[list[Part]]:
    """What each stage holds: its layers, the first the embedding as well, the last the head; both a tied embedding."""
    found, last = parts(model, degrees, section), len(bounds) - 1

    def holds(stage: int, part: Part) -> bool:
        if part.where is not None:
            return part.where in bounds[stage]
        if part.name.startswith("head."):
            return stage == last
        return stage == 0 or (stage == last and model.config.tie_word_embeddings and part.name.startswith("embed"))

    return [[part for part in found if holds(stage, part)] for stage in range(len(bounds))]


def of_rank(held: Sequence[list[Part]], stages: Sequence[int]) -> list[Part]:
    """What a rank with these stages holds; a tied embedding in two of them is one."""
    return list({part.name: part for stage in stages for part in held[stage]}.values())
