"""All ways of filling a cluster with the dimensions of a mesh that a model can be cut along, and the choices that go
with each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from nanoworks.common.errors import UserError
from nanoworks.config.parallel import ParallelSection
from nanoworks.models import Decoder
from nanoworks.nn.head import Head
from nanoworks.nn.linear import GroupedLinear, Linear
from nanoworks.parallel.context import check_rows
from nanoworks.parallel.mesh import ORDER, Degrees
from nanoworks.parallel.tensor import check_divisible, planned
from nanoworks.train.plan.hardware import Cluster
from nanoworks.train.plan.workload import Workload

_SCHEDULES = 2
"""Of a pipeline that are weighed, besides the recipe's."""


def meshes(work: Workload, cluster: Cluster, refused: dict[str, str]) -> Iterator[Degrees]:
    """All that can be asked of the model, whether the dimensions go together or not; into `refused` go the degrees that
    cannot, with the reason."""
    world, model = cluster.count, work.model
    for tensor in _divisors(world):
        if tensor > 1 and (why := _tensor_refusal(model, tensor, cluster.hardware.devices_per_node)):
            refused[f"tensor={tensor}"] = why
            continue
        for pipeline in _divisors(world // tensor):
            if pipeline > 1 and (why := _pipeline_refusal(model, pipeline)):
                refused[f"pipeline={pipeline}"] = why
                continue
            for context in _divisors(world // tensor // pipeline):
                if context > 1 and (why := _context_refusal(work, context, tensor)):
                    refused[f"context={context}"] = why
                    continue
                left = world // tensor // pipeline // context
                for shard in _divisors(left):
                    plain = Degrees(pipeline, left // shard, shard, context, tensor)
                    yield plain
                    for expert in _divisors(plain.data)[1:] if work.num_experts else ():
                        nested = shard % expert == 0 or expert % shard == 0  # as parallel.mesh takes them out
                        if nested and work.num_experts % expert == 0:
                            yield replace(plain, expert=expert)


def sections(work: Workload, degrees: Degrees) -> Iterator[ParallelSection]:
    """The recipe's choices, with those that follow from the degrees."""
    asked = work.recipe.parallel
    values: dict[str, Any] = asked.model_dump() | {"strategy": "native"}
    values |= {name: getattr(degrees, name) for name in (*ORDER, "expert")}
    if degrees.expert == 1:
        values["expert_placement"] = None
    model = work.model
    values["sequence_parallel"] = degrees.tensor > 1 and type(model).forward is Decoder.forward
    whole = model.config.vocab_size % degrees.tensor == 0
    values["loss_parallel"] = degrees.tensor > 1 and whole and type(model.head) is Head
    schedules = _schedules(work, degrees) if degrees.pipeline > 1 else [asked.pipeline_schedule]
    for schedule in schedules:
        for reshard in (False, True) if degrees.shard * degrees.context > 1 else (True,):
            yield ParallelSection(**{**values, "reshard_after_forward": reshard, "pipeline_schedule": schedule})


def _schedules(work: Workload, degrees: Degrees) -> list[str]:
    """The pipeline schedules that leave ranks waiting the least with as many micro-batches as a step has, at most
    two a rank; and the recipe's own."""
    from nanoworks.parallel.pipeline_schedule import SCHEDULES, search  # torch's pipelining imports for a second

    rows = work.tokens_per_step // (work.sequence_length * degrees.data)
    rows = min(rows, 2 * degrees.pipeline)
    found = search(work.costs, degrees.pipeline, rows, max_stages_per_rank=2)
    names = [candidate.schedule for candidate in found if candidate.bubble is not None]
    names = list(dict.fromkeys([*names[:_SCHEDULES], work.recipe.parallel.pipeline_schedule]))
    if work.model.config.tie_word_embeddings and degrees.data * degrees.context > 1:
        names = [name for name in names if not SCHEDULES[name].v_shaped]  # as Pipeline.shard refuses
    return names


def _tensor_refusal(model: Decoder, tensor: int, devices_per_node: int) -> str | None:
    """As `parallel.tensor_training` refuses, and where the network is too slow for it."""
    try:
        check_divisible(model.config, tensor)
    except UserError as error:
        return str(error).replace("tensor_parallel", "parallel.tensor")
    for name, style in planned(model).items():
        leaf = model.get_submodule(name)
        if not isinstance(leaf, (Linear, GroupedLinear)):
            return f"a {model.config.model_type} is not trained so: its plan cuts embeddings too"
        size = leaf.out_features if style == "colwise" else leaf.in_features
        if size % tensor:
            return f"it does not divide the {size} features of {name}"
    if tensor > devices_per_node:
        return f"its collectives would cross nodes of {devices_per_node} devices"
    return None


def _pipeline_refusal(model: Decoder, pipeline: int) -> str | None:
    from nanoworks.parallel.pipeline import check_family  # torch's pipelining takes a second to import

    if pipeline > len(model.layers):
        return f"the model has {len(model.layers)} layers"
    try:
        check_family(model)
    except UserError as error:
        return str(error)
    return None


def _context_refusal(work: Workload, context: int, tensor: int) -> str | None:
    """As `parallel.context` refuses."""
    method, heads = work.recipe.parallel.context_method, work.model.config.num_key_value_heads // tensor
    try:
        check_rows(work.sequence_length, context, method)
    except UserError as error:
        return str(error)
    if method == "ulysses" and heads % context:
        return f"ulysses cannot share {heads} key/value heads; context_method=all_gather can"
    return None


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
