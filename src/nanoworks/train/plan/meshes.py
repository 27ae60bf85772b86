"""All ways of filling a cluster with the dimensions of a mesh that a model can be cut along."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from nanoworks.common.errors import UserError
from nanoworks.models import Decoder
from nanoworks.nn.linear import GroupedLinear, Linear
from nanoworks.parallel.mesh import Degrees
from nanoworks.parallel.tensor import check_divisible, planned
from nanoworks.train.plan.hardware import Cluster
from nanoworks.train.plan.workload import Workload


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
                if context > 1 and work.sequence_length % (2 * context):
                    refused[f"context={context}"] = f"it does not divide rows of {work.sequence_length} tokens"
                    continue
                left = world // tensor // pipeline // context
                for shard in _divisors(left):
                    plain = Degrees(pipeline, left // shard, shard, context, tensor)
                    yield plain
                    inner = shard * context * tensor
                    for expert in _divisors(inner)[1:]:
                        if work.num_experts and work.num_experts % expert == 0:
                            yield replace(plain, expert=expert)


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


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
