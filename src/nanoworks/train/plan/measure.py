"""Corrects a plan by some micro-batches on the devices at hand: how much longer arithmetic takes than was predicted.

By itself a process trains on random tokens with the micro-batch and checkpointing of the candidate, and what ranks tell
each other stays the model's. Under torchrun the ranks run the candidate as it would be trained, so that their messages
are in what is measured.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from nanoworks.common.device import choose_device, memory_bytes, peak_memory_bytes
from nanoworks.common.errors import UserError
from nanoworks.config.parallel import ParallelSection
from nanoworks.models import Decoder, build_model
from nanoworks.nn.context import DenseContext
from nanoworks.nn.linear import set_compute_dtype
from nanoworks.parallel import own_device
from nanoworks.parallel.mesh import Degrees, world_size
from nanoworks.parallel.starting import open_strategy
from nanoworks.train.plan.hardware import Cluster
from nanoworks.train.plan.planner import Forecast, forecast
from nanoworks.train.plan.workload import Workload
from nanoworks.train.stage import Loss


@dataclass(frozen=True)
class Measured:
    """One candidate; of several ranks the slowest and the fullest."""

    predicted_seconds: float
    """Of a micro-batch, forward and backward."""
    seconds: float
    predicted_bytes: int
    """Parameters, gradients and activations: the optimizer takes no part."""
    peak_bytes: int

    @property
    def scale(self) -> float:
        return self.seconds / self.predicted_seconds


@dataclass(frozen=True)
class _Rows:
    """A micro-batch of random tokens."""

    tokens: Tensor

    def to(self, device: torch.device) -> _Rows:
        return _Rows(self.tokens.to(device))


def measure(work: Workload, cluster: Cluster, candidate: Forecast, *, repeats: int = 3) -> Measured:
    """Run a step of micro-batches of `candidate` so many times, after one to warm up, here: on the ranks that torchrun
    started, every one of which must call this, or on one device.

    Raises:
        UserError: this machine has no device of the kind, another number of ranks, or not the memory.
    """
    device = own_device(choose_device("auto"))
    if device.type != cluster.hardware.device:
        raise UserError(
            f"--measure: the plan is for {cluster.hardware.name} and this machine has a {device.type}; run it "
            "there, or leave --measure out"
        )
    world = world_size()
    if world not in (1, cluster.count):
        raise UserError(f"--measure: the plan is for {cluster} and torchrun started {world}; make the numbers the same")
    if world == 1:
        one, options = Cluster(cluster.hardware, 1), {"rows": candidate.rows, "checkpointing": candidate.checkpointing}
        candidate = forecast(work, one, Degrees(), ParallelSection(shard=1), **options)  # type: ignore[arg-type]
    expected = candidate.memory.total - candidate.memory.optimizer
    if expected > memory_bytes(device):
        raise UserError(
            f"--measure runs on one device, where this takes {expected / 2**30:.1f} GiB; measure with fewer layers "
            "(model.num_hidden_layers=...), under torchrun, or leave it out"
        )
    steps = 1 if candidate.degrees.pipeline == 1 else candidate.micro_batches  # a pipeline needs all of them
    s = candidate.seconds
    predicted = (s.total - s.optimizer) / candidate.micro_batches
    seconds, peak = _run(work, candidate, device, steps, repeats)
    return Measured(predicted, seconds, expected, peak)


def _run(work: Workload, candidate: Forecast, device: torch.device, count: int, repeats: int) -> tuple[float, int]:
    """(seconds of a micro-batch, bytes at the peak) of the slowest and the fullest rank."""
    strategy = open_strategy(
        candidate.section,
        device,
        work.dtype,
        compile=work.recipe.hardware.compile,
        activation_checkpointing=candidate.checkpointing,
    )
    try:
        model = build_model(work.model.config)
        model.init_weights()
        model = strategy.prepare(model)
        set_compute_dtype(model, None if work.dtype == torch.float32 else work.dtype)
        model.train()
        size = (candidate.rows, work.sequence_length)
        rows = [_Rows(torch.randint(model.config.vocab_size, size)) for _ in range(count)]
        best = float("inf")
        for _ in range(repeats + 1):
            began = time.perf_counter()
            strategy.forward_backward(rows, _loss, 1 / (count * rows[0].tokens.numel()))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - began)
        found = strategy.gather([best / count, peak_memory_bytes(device)])
        return max(seconds for seconds, _ in found), max(peak for _, peak in found)
    finally:
        strategy.close()


def _loss(model: Decoder, batch: _Rows) -> Loss:
    tokens = batch.tokens
    weights = torch.ones(tokens.shape, device=tokens.device)
    return Loss(model.head.loss(model(tokens, DenseContext(tokens)), tokens, weights))
