"""Shards a recipe's model over a fake process group, on the meta device, and prints what a rank holds.

    python tests/parallel/fake_world.py 64:pretrain/llama-1b:tensor=4 256:pretrain/llama-3b

A process of its own, because a fake process group is torch's global one.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from nanoworks.config import load_recipe
from nanoworks.config.parallel import ParallelSection
from nanoworks.parallel.data_parallel import layer_options, shard_parameters
from nanoworks.parallel.expert import split_experts
from nanoworks.parallel.mesh import build_mesh, degrees
from nanoworks.parallel.tensor_training import split_matrices
from nanoworks.train.plan import workload
from nanoworks.train.plan.shares import by_stage, cut, of_rank, stages_of_ranks


def shard(recipe_name: str, world: int, values: dict[str, Any]) -> dict[str, int]:
    """Bytes of parameters on this rank, as sharded and as planned."""
    section = ParallelSection(**values, loss_parallel=values.get("tensor", 1) > 1)
    work = workload(load_recipe(recipe_name), torch.device("cuda"))
    found = degrees(section, world)
    mesh = build_mesh(found, torch.device("cpu"))
    stages = stages_of_ranks(section.pipeline_schedule, found.pipeline)
    bounds = cut(work.model, sum(map(len, stages)))
    held = by_stage(work.model, found, section, bounds)
    planned = sum(4 * part.size for part in of_rank(held, stages[mesh["pipeline"].get_local_rank()]))
    model, pipeline = work.model, None
    if found.pipeline > 1:
        from nanoworks.parallel.pipeline import Pipeline

        pipeline = Pipeline(
            model,
            mesh.groups("pipeline"),
            schedule=section.pipeline_schedule,
            device=torch.device("cpu"),
            sequence_length=model.config.max_position_embeddings,
        )
    if found.tensor > 1:
        split_matrices(model, mesh["tensor"], loss_parallel=section.loss_parallel)
    data = mesh[("replicate", "shard")] if found.replicate > 1 else mesh["shard"]
    experts = None
    if found.expert > 1:
        split_experts(model, mesh.of_experts("expert"))
        experts = mesh.of_experts("replicate", "shard")
    if pipeline is None:
        shard_parameters(model, data, section, torch.bfloat16, torch.device("cpu"), experts=experts)
    elif found.data * found.context > 1:
        pipeline.shard(data, layers=layer_options(section, torch.bfloat16, data))
    local = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    assert all(p.is_meta for p in local)
    return {"sharded": sum(p.numel() * p.element_size() for p in local), "planned": planned}


def main() -> None:
    for job in sys.argv[1:]:
        world, name, *given = job.split(":")
        pairs = (pair.split("=") for pair in given)
        values: dict[str, Any] = {key: int(value) if value.isdigit() else value for key, value in pairs}
        dist.init_process_group("fake", store=FakeStore(), rank=values.pop("rank", 0), world_size=int(world))
        print(json.dumps({"job": job, **shard(name, int(world), values)}), flush=True)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
