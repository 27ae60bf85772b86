"""Corrects a plan by a few steps on the device at hand: how much longer its arithmetic takes than was predicted.

One process trains on random tokens, with the micro-batch and checkpointing of the candidate. What ranks tell each other
is not measured; that stays the model's.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from nanoworks.common.device import choose_device, memory_bytes, peak_memory_bytes
from nanoworks.common.errors import UserError
from nanoworks.config.parallel import ParallelSection
from nanoworks.models import build_model
from nanoworks.nn.context import DenseContext
from nanoworks.nn.linear import set_compute_dtype
from nanoworks.parallel.mesh import Degrees
from nanoworks.parallel.strategy import place
from nanoworks.train.plan.hardware import Cluster
from nanoworks.train.plan.planner import Forecast, forecast
from nanoworks.train.plan.workload import Workload


@dataclass(frozen=True)
class Measured:
    """One device, one candidate."""

    predicted_seconds: float
    """Of a micro-batch, forward and backward."""
    seconds: float
    predicted_bytes: int
    """Parameters, gradients and activations: the optimizer takes no part."""
    peak_bytes: int

    @property
    def scale(self) -> float:
        return self.seconds / self.predicted_seconds


def measure(work: Workload, cluster: Cluster, candidate: Forecast, *, repeats: int = 3) -> Measured:
    """Run `repeats` micro-batches of `candidate`, after one to warm up, on the device that is here.

    Raises:
        UserError: this machine has no device of the kind, or one device cannot hold the model.
    """
    device = choose_device("auto")
    if device.type != cluster.hardware.device:
        raise UserError(
            f"--measure: the plan is for {cluster.hardware.name} and this machine has a {device.type}; run it "
            "there, or leave --measure out"
        )
    alone = forecast(
        work,
        Cluster(cluster.hardware, 1),
        Degrees(),
        ParallelSection(shard=1),
        rows=candidate.rows,
        checkpointing=candidate.checkpointing,
    )
    expected = alone.memory.total - alone.memory.optimizer
    if expected > memory_bytes(device):
        raise UserError(
            f"--measure runs on one device, where this takes {expected / 2**30:.1f} GiB; measure with fewer layers "
            "(model.num_hidden_layers=...) or leave it out"
        )
    seconds = _seconds(work, candidate, device, repeats)
    predicted = (alone.seconds.products + alone.seconds.elementwise) / alone.micro_batches
    return Measured(predicted, seconds, expected, peak_memory_bytes(device))


def _seconds(work: Workload, candidate: Forecast, device: torch.device, repeats: int) -> float:
    model = build_model(work.model.config)
    model.init_weights()
    model.to(device)
    set_compute_dtype(model, None if work.dtype == torch.float32 else work.dtype)
    place(model, compile=work.recipe.hardware.compile, activation_checkpointing=candidate.checkpointing)
    model.train()
    size = (candidate.rows, work.sequence_length)
    tokens = torch.randint(model.config.vocab_size, size, device=device)
    weights = torch.ones(size, device=device)
    best = float("inf")
    for _ in range(repeats + 1):
        began = time.perf_counter()
        loss = model.head.loss(model(tokens, DenseContext(tokens)), tokens, weights)
        (loss / tokens.numel()).backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best
