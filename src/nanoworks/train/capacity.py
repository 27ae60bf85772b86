"""What a capacity of experts costs and saves: a trained model measured at several capacity factors.

nanoworks sweep-capacity runs/moe --factors 0.5,1,1.5
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from nanoworks.checkpoint import Checkpoint
from nanoworks.common.errors import UserError
from nanoworks.config import load_recipe
from nanoworks.config.recipe import DataSection
from nanoworks.data import Loader
from nanoworks.evals import bits_per_byte
from nanoworks.nn.moe import AS_BUILT, MoE
from nanoworks.train.resolve import build_mixture
from nanoworks.train.stage import STAGES


@dataclass(frozen=True)
class CapacityPoint:
    factor: float | None
    """None: no capacity."""
    loss: float
    bpb: float
    dropped: float
    """Share of the choices of experts that were dropped."""
    tokens_per_second: float


def capacity_sweep(
    checkpoint: Checkpoint,
    factors: Sequence[float],
    *,
    data: DataSection,
    loss_on: Literal["all", "assistant"] = "all",
    rows: int = 8,
    tokens: int = 65_536,
    device: torch.device | str = "cpu",
) -> Iterator[CapacityPoint]:
    """Measure the model without a capacity, then at each of `factors`, all on the same `tokens` of `data.validation`.

    `rows` of `data.sequence_length` tokens are what a capacity is counted over, as a micro-batch is in training.

    Raises:
        UserError: the model has no experts or no tokenizer, or a factor is not a positive number.
    """
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    if not layers:
        raise UserError(f"{checkpoint.path} is a {model.config.model_type}, which has no experts to give a capacity")
    if tokenizer is None:
        raise UserError(f"{checkpoint.path} has no tokenizer")
    if wrong := [factor for factor in factors if not 0 < factor < math.inf]:
        raise UserError(f"a capacity factor is above 0, not {wrong[0]:g}; 1 is the even share")
    mixture = build_mixture(data.validation, "validation")

    def measure(factor: float | None) -> CapacityPoint:
        counted = _Count()
        hooks = [layer.register_forward_hook(counted) for layer in layers]
        for layer in layers:
            layer.rules = replace(AS_BUILT, capacity_factor=factor)
            layer.training = True  # rules hold in training only
        try:
            with Loader(
                mixture,
                tokenizer,
                sequence_length=data.sequence_length,
                batch_size=rows,
                packing=data.packing,
                overlong=data.overlong,
                documents=data.document_mask,
                loss_on=loss_on,
                infinite=False,
                buffer=data.buffer,
            ) as loader:
                batches = _first(loader, tokens)
            started = time.perf_counter()
            found = bits_per_byte(model, batches, tokenizer.token_bytes(), device)
            seconds = time.perf_counter() - started
        finally:
            for hook in hooks:
                hook.remove()
            for layer in layers:
                layer.rules = AS_BUILT
                layer.training = False
        processed = sum(batch.tokens.numel() for batch in batches)
        return CapacityPoint(factor, found["loss"], found["bpb"], counted.share, processed / seconds)

    measure(None)  # the first pass of all is slow
    for factor in (None, *factors):
        yield measure(factor)


def validation_of(path: Path) -> tuple[DataSection, Literal["all", "assistant"]] | None:
    """The data and which of its tokens count in the run that `path` is, or is a checkpoint of; None without one, or
    when it validates on nothing."""
    for directory in (path, path.parent):
        if (directory / "config.yaml").is_file():
            recipe = load_recipe(directory / "config.yaml", environ={})
            options = STAGES.parse(recipe.stage.name, recipe.stage.options, where="stage")
            return (recipe.data, getattr(options, "loss_on", "assistant")) if recipe.data.validation else None
    return None


class _Count:
    """A forward hook that adds up what routers dropped."""

    def __init__(self) -> None:
        self.dropped = 0
        self.choices = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        assert isinstance(module, MoE)
        routing = args[1].routing[module.layer]
        self.dropped += int(routing.dropped)
        self.choices += routing.experts.numel()

    @property
    def share(self) -> float:
        return self.dropped / max(1, self.choices)


def _first(loader: Loader, tokens: int) -> list[Any]:
    """Batches until they hold `tokens`; whole ones, so that capacities compare."""
    batches: list[Any] = []
    for batch in loader:
        batches.append(batch)
        if sum(b.tokens.numel() for b in batches) >= tokens:
            break
    return batches
