"""`parallel.strategy: auto`: the recipe as the planner would run it on the devices that are here."""

from __future__ import annotations

import logging
from typing import Any

import torch

from nanoworks.common.errors import UserError
from nanoworks.config import Recipe
from nanoworks.parallel.mesh import world_size
from nanoworks.train.plan.hardware import Cluster, here
from nanoworks.train.plan.planner import Forecast, plan
from nanoworks.train.plan.workload import workload

log = logging.getLogger("nanoworks")


def chosen(recipe: Recipe, device: torch.device) -> Recipe:
    """`recipe` as it is to be run: with `parallel.strategy: auto` what the first rank plans, told to all of them.

    Where torchrun started several, this joins their process group. Every rank must call it.

    Raises:
        UserError: nothing fits; every rank gets the reasons.
    """
    if recipe.parallel.strategy != "auto":
        return recipe
    if world_size() == 1:
        return automatic(recipe, device, 1)[0]
    import torch.distributed as dist

    from nanoworks.parallel.rendezvous import start_group

    start_group(device, recipe.parallel)
    answer: list[dict[str, Any]] = [{}]
    if dist.get_rank() == 0:
        try:
            found, best = automatic(recipe, device, world_size())
            log.info("parallel.strategy=auto: %s", " ".join(best.overrides))
            answer = [{"recipe": found.model_dump(mode="json")}]
        except UserError as error:
            answer = [{"error": str(error)}]
    dist.broadcast_object_list(answer)
    if "error" in answer[0]:
        raise UserError(answer[0]["error"])
    return Recipe(**answer[0]["recipe"])


def automatic(
    recipe: Recipe, device: torch.device, world: int, *, vocab_size: int | None = None
) -> tuple[Recipe, Forecast]:
    """`recipe` with the degrees, micro-batch and checkpointing of the best way on `world` devices like `device`.

    Raises:
        UserError: nothing fits; the message gives the reasons.
    """
    best = plan(workload(recipe, device, vocab_size=vocab_size), Cluster(here(device), world)).best()
    changes = {
        "parallel": best.section,
        "train": recipe.train.model_copy(update={"micro_batch_size": best.rows}),
        "hardware": recipe.hardware.model_copy(update={"activation_checkpointing": best.checkpointing}),
    }
    return recipe.model_copy(update=changes), best
