"""What distinguishes the stages of training; everything they share is the Trainer's.

A stage yields the micro-batches of each step, turns one into a loss, and measures itself. It is built from
a `StageContext` and its own options.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from nanoworks.common.registry import Registry
from nanoworks.config import Frozen, Recipe
from nanoworks.models import Decoder
from nanoworks.parallel import Strategy
from nanoworks.tokenizer import Tokenizer
from nanoworks.train.optim import Optimizer, ParamGroups


class MicroBatch(Protocol):
    """One forward pass worth of rows."""

    num_supervised: int
    """Tokens that carry loss."""
    state: dict[str, Any]
    """Position of the data after this batch; resuming from it gives exactly the next one."""
    stats: Mapping[str, float]

    def to(self, device: torch.device) -> Any: ...


@dataclass(frozen=True)
class Loss:
    """`sum` over the supervised tokens of a micro-batch (a scalar tensor), and what else is worth logging.

    Metrics are sums too: the trainer divides them by the step's supervised tokens.
    """

    sum: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class StageContext:
    recipe: Recipe
    model: Decoder
    tokenizer: Tokenizer
    device: torch.device
    strategy: Strategy


class Stage(ABC):
    Options: ClassVar[type[Frozen]] = Frozen

    def __init__(self, context: StageContext, options: Any) -> None:
        self.context, self.options = context, options

    @abstractmethod
    def total_steps(self) -> int:
        """Steps that the recipe's `train.length` comes to."""

    @abstractmethod
    def batches(self, state: dict[str, Any] | None) -> Iterator[list[Any]]:
        """Yield the micro-batches of one step after another, from `state` (the last batch's) on."""

    @abstractmethod
    def loss(self, model: Decoder, batch: Any) -> Loss: ...

    def before_step(self, step: int, total_steps: int, optimizer: Optimizer) -> None:
        """Prepare step number `step` (from 0); the optimizer's `lrs` may be changed."""

    def after_step(self) -> None:
        """Change what the step asks for besides the optimizer, before anything is saved."""

    def evaluate(self) -> dict[str, float]:
        """Validation metrics of the model as it is now; `val/loss` decides which checkpoint is best."""
        return {}

    def step_metrics(self) -> dict[str, float]:
        """Figures of the step just taken that are not losses (rewards, for instance)."""
        return {}

    @property
    def trained(self) -> nn.Module:
        """What the run trains: the model itself, unless the stage adds modules to a frozen one."""
        return self.context.model

    def flops_per_token(self, sequence_length: int) -> int:
        """FLOPs of training on a token of rows of this length, forward and backward: what MFU counts."""
        return self.context.model.flops_per_token(sequence_length)

    def param_groups(self) -> ParamGroups:
        """Parameters to optimize, by role."""
        return self.context.model.param_groups()

    def save(self, directory: Path) -> None:
        """Add to the checkpoint in `directory` what the stage trains besides the model."""

    def resume(self, directory: Path) -> None:
        """Take back what `save` left in `directory`."""

    def close(self) -> None:
        """Stop background work."""


STAGES: Registry[type[Stage]] = Registry(
    "stage",
    {
        "pretrain": "nanoworks.train.supervised",
        "midtrain": "nanoworks.train.supervised",
        "sft": "nanoworks.train.supervised",
        "rl": "nanoworks.train.rl",
        "medusa": "nanoworks.train.medusa",
    },
)
