"""What was predicted beside what came of it: the last lines of a run."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nanoworks.common.human import count
from nanoworks.config import Recipe
from nanoworks.parallel.mesh import Degrees
from nanoworks.train.plan.hardware import Cluster, here
from nanoworks.train.plan.planner import Forecast, forecast
from nanoworks.train.plan.workload import workload


def expectation(recipe: Recipe, degrees: Degrees, device: torch.device, *, vocab_size: int) -> Forecast:
    """What the recipe should take as it is being run: on `degrees.world` devices like this one."""
    return forecast(
        workload(recipe, device, vocab_size=vocab_size),
        Cluster(here(device), degrees.world),
        degrees,
        recipe.parallel,
        rows=recipe.train.micro_batch_size,
        checkpointing=recipe.hardware.activation_checkpointing,
    )


def predicted_against_actual(predicted: Forecast, *, tokens_per_second: float, peak_bytes: Sequence[int]) -> list[str]:
    """Two lines for a person; `tokens_per_second` are of all ranks, `peak_bytes` of each."""
    speed, memory = predicted.tokens_per_second, predicted.memory.total
    fullest = max(peak_bytes)
    return [
        f"tokens/s: {count(speed)} predicted, {count(tokens_per_second)} actual "
        f"({_difference(tokens_per_second, speed)})",
        f"memory of the fullest rank: {memory / 2**30:.2f} GiB predicted, {fullest / 2**30:.2f} GiB actual "
        f"({_difference(fullest, memory)})",
    ]


def _difference(actual: float, predicted: float) -> str:
    return f"{100 * (actual / predicted - 1):+.0f}%"
