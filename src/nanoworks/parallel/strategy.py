"""The trainer's view of devices: prepare a model, run backward, clip, step, and sum numbers over ranks."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from nanoworks.models import Decoder


class Steppable(Protocol):
    def step(self, lr_scale: float, step: int) -> None: ...


class Strategy(Protocol):
    rank: int
    world_size: int

    def prepare(self, model: Decoder) -> Decoder:
        """Place the model, in the one order TP -> EP -> activation checkpointing -> compile -> FSDP2."""
        ...

    def backward(self, loss: Tensor) -> None: ...

    def clip(self, model: nn.Module, max_norm: float) -> float:
        """Scale gradients down to a global norm of `max_norm` (0: leave them); return the norm before."""
        ...

    def step(self, optimizer: Steppable, lr_scale: float, step: int) -> None: ...

    def sum(self, value: float) -> float:
        """Sum of `value` over all ranks."""
        ...


class SingleDevice:
    """One process, one device."""

    rank = 0
    world_size = 1

    def __init__(self, device: torch.device, *, compile: bool = False, activation_checkpointing: bool = False) -> None:
        self.device, self.compile, self.activation_checkpointing = device, compile, activation_checkpointing

    def prepare(self, model: Decoder) -> Decoder:
        model.to(self.device)
        model.activation_checkpointing = self.activation_checkpointing
        if self.compile:
            for layer in model.layers:
                layer.compile()  # in place: names of modules and parameters stay
        return model

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip(self, model: nn.Module, max_norm: float) -> float:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        if max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm, foreach=True)
        return float(norm)

    def step(self, optimizer: Steppable, lr_scale: float, step: int) -> None:
        optimizer.step(lr_scale, step)

    def sum(self, value: float) -> float:
        return value
