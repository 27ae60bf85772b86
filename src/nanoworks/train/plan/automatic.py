"""`parallel.strategy: auto`: the recipe as the planner would run it on the devices that are here."""

from __future__ import annotations

import torch

from nanoworks.config import Recipe
from nanoworks.train.plan.hardware import Cluster, here
from nanoworks.train.plan.planner import Forecast, plan
from nanoworks.train.plan.workload import workload


def automatic(
    recipe: Recipe, device: torch.device, world: int, *, vocab_size: int | None = None
) -> tuple[Recipe, Forecast]:
    """`recipe` with the degrees, micro-batch and checkpointing of the best way on `world` devices like `device`.

    What is free on a machine differs from moment to moment, so one rank must ask and tell the others.

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
