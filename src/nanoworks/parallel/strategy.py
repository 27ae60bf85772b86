"""The trainer's view of devices. It never asks which strategy it has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from nanoworks.config.recipe import Checkpointing
from nanoworks.models import Decoder
from nanoworks.parallel.mesh import Mesh


class Steppable(Protocol):
    def step(self, lr_scale: float, step: int) -> None: ...


class HasSum(Protocol):
    """What a stage's loss is to a strategy: `sum` is a scalar to run backward from."""

    @property
    def sum(self) -> Tensor: ...


L = TypeVar("L", bound=HasSum)
O = TypeVar("O", bound=Steppable)


class Strategy(Protocol):
    """Methods that say "every rank" wait until all ranks call them, in the same order."""

    mesh: Mesh

    @property
    def in_parts(self) -> bool:
        """Whether what ranks hold can be saved and loaded part by part: DTensors, and plain tensors that are whole.
        Otherwise it is saved by `wholes`, and loaded from them."""
        ...

    def prepare(self, model: Decoder) -> Decoder:
        """Spread the model, in the one order pipeline cut -> TP -> EP -> CP -> activation checkpointing -> compile ->
        FSDP2 (or DDP)."""
        ...

    def adopt(self, optimizer: O) -> O:
        """What the trainer is to use in place of `optimizer`, which was just built over the prepared model: itself,
        unless an engine steps for it. UserError when the engine cannot. Every rank."""
        ...

    def forward_backward(
        self, micro_batches: Sequence[Any], compute: Callable[[Decoder, Any], L], scale: float
    ) -> list[L]:
        """Forward and backward of a step: gradients of `scale * sum` over all micro-batches of all ranks are left in
        the parameters. Returns what `compute(model, micro_batch)` gave for each. Every rank."""
        ...

    def clip(self, model: nn.Module, max_norm: float) -> float:
        """Scale gradients down to a global norm of `max_norm` (0: leave them); return the norm before. Every rank."""
        ...

    def step(self, optimizer: Steppable, lr_scale: float, step: int) -> None: ...

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the ranks that read different data; of a pipeline's ranks those with the last stage
        count, because only they know what came of the data. Every rank."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """The JSON-like values of all ranks, by rank, on each. Every rank."""
        ...

    def wholes(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """By name the whole tensors of the whole model, one at a time, whoever holds them or parts of them.

        `tensors` are this rank's: parameters, an optimizer's state. Parameters come in the model's order, and every
        rank gets the same names in the same order. Of tensors on the meta device nothing is sent: they come as shapes.
        Every rank must take all of them.
        """
        ...

    def replica(self, model: Decoder) -> Decoder:
        """A model that runs on one rank alone, with the weights as they are: `model` itself where it is whole. Every
        rank, and each gets one."""
        ...

    def evaluable(self, model: Decoder) -> Decoder:
        """What all ranks can run forward with, each on the same data: `model` itself unless ranks hold only some of
        its layers. Every rank."""
        ...

    def metrics(self) -> dict[str, float]:
        """Figures of the last step that the strategy itself measured."""
        ...

    def settle(self) -> None:
        """After forward passes without a backward: the parameters are again those that the optimizer knows."""
        ...

    def barrier(self) -> None:
        """Wait for every rank."""
        ...

    def close(self) -> None: ...


class SingleDevice:
    """One process, one device."""

    in_parts = False

    def __init__(
        self, device: torch.device, *, compile: bool = False, activation_checkpointing: Checkpointing = "none"
    ) -> None:
        self.device, self.compile, self.activation_checkpointing = device, compile, activation_checkpointing
        self.mesh = Mesh()
        self._model: Decoder | None = None

    def prepare(self, model: Decoder) -> Decoder:
        model.to(self.device)
        place(model, compile=self.compile, activation_checkpointing=self.activation_checkpointing)
        self._model = model
        return model

    def adopt(self, optimizer: O) -> O:
        return optimizer

    def forward_backward(
        self, micro_batches: Sequence[Any], compute: Callable[[Decoder, Any], L], scale: float
    ) -> list[L]:
        assert self._model is not None
        losses = []
        for batch in micro_batches:
            loss = compute(self._model, batch.to(self.device))
            (loss.sum * scale).backward()
            losses.append(loss)
        return losses

    def clip(self, model: nn.Module, max_norm: float) -> float:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        if max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm, foreach=True)
        return float(norm)

    def step(self, optimizer: Steppable, lr_scale: float, step: int) -> None:
        optimizer.step(lr_scale, step)

    def sum(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def wholes(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        yield from tensors.items()

    def replica(self, model: Decoder) -> Decoder:
        return model

    def evaluable(self, model: Decoder) -> Decoder:
        return model

    def metrics(self) -> dict[str, float]:
        return {}

    def settle(self) -> None: ...

    def barrier(self) -> None: ...

    def close(self) -> None: ...


def place(model: Decoder, *, compile: bool, activation_checkpointing: Checkpointing) -> None:
    """The two steps that one device and many have in common."""
    model.activation_checkpointing = activation_checkpointing
    if compile:
        for layer in model.layers:
            layer.compile()  # in place: names of modules and parameters stay
