"""Before the first step: what a run is expected to take, and whether that fits."""

from __future__ import annotations

import torch

from nanoworks.common.errors import UserError
from nanoworks.config import ModelConfig, Recipe
from nanoworks.parallel.mesh import Degrees
from nanoworks.train.plan.hardware import Cluster, here
from nanoworks.train.plan.planner import Forecast, forecast, plan
from nanoworks.train.plan.workload import Workload, workload


def require_fit(recipe: Recipe, degrees: Degrees, device: torch.device, config: ModelConfig) -> Forecast | None:
    """What the recipe should take as it is being run: on `degrees.world` devices like this one, a model of `config`.
    None under DeepSpeed, whose buffers the planner does not know.

    Raises:
        UserError: more memory than there is; the message names the micro-batch or the way that would fit.
    """
    if recipe.parallel.strategy == "deepspeed":
        return None
    work, cluster = workload(recipe, device, config=config), Cluster(here(device), degrees.world)
    rows = recipe.train.micro_batch_size
    expected = _with(work, cluster, degrees, rows)
    available = cluster.memory()
    if expected.memory.total <= available:
        return expected
    need, have = expected.memory.total / 2**30, available / 2**30
    whose = " a rank" if degrees.world > 1 else ""
    raise UserError(
        f"a micro-batch of {rows} rows needs about {need:.1f} GiB{whose}, {have:.1f} GiB are free; "
        f"{_remedy(work, cluster, degrees, rows, available)}"
    )


def _remedy(work: Workload, cluster: Cluster, degrees: Degrees, rows: int, available: int) -> str:
    one, two = (_with(work, cluster, degrees, n).memory.total for n in (1, 2))
    fitting = 1 + (available - one) // (two - one)
    if fitting >= 1:
        return f"train.micro_batch_size={min(fitting, rows - 1)} would fit"
    why = f"not even one row fits ({one / 2**30:.1f} GiB)"
    others = plan(work, cluster).forecasts
    if others:
        return f"{why}, but this would: {' '.join(others[0].overrides)}"
    return f"{why}, nor any other way on {cluster}: take a smaller model or shorter rows"


def _with(work: Workload, cluster: Cluster, degrees: Degrees, rows: int) -> Forecast:
    recipe = work.recipe
    checkpointing = recipe.hardware.activation_checkpointing
    return forecast(work, cluster, degrees, recipe.parallel, rows=rows, checkpointing=checkpointing)
