"""Bytes that the fullest rank needs, from the parts it holds and the activations of its micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from nanoworks.config.parallel import ParallelSection
from nanoworks.config.recipe import Checkpointing
from nanoworks.parallel.mesh import Degrees
from nanoworks.train.memory import RESERVE, head_bytes, layer_bytes, waste
from nanoworks.train.plan.shares import Part
from nanoworks.train.plan.workload import Workload

COMMUNICATION = 2**30
"""NCCL's channels and the buffers of several process groups on a GPU."""


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest rank."""

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    """Layers that FSDP2 has brought together, with their gradients; or copies of weights for the arithmetic."""
    activations: int
    head: int
    kv_cache: int
    margin: int
    """Fragmentation."""
    reserve: int
    """The process, the device's context, buffers of communication."""

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def lasting(self) -> int:
        return self.parameters + self.gradients + self.optimizer


def rank_memory(
    work: Workload,
    degrees: Degrees,
    section: ParallelSection,
    held: Sequence[Part],
    layers: range,
    *,
    rows: int,
    in_flight: int,
    checkpointing: Checkpointing,
    last: bool,
) -> Memory:
    """Of a rank that holds `held`, which are `layers` and what is around them.

    `in_flight` micro-batches of `rows` rows have their activations there at once; with several stages a rank, `layers`
    are those of one stage and `in_flight` counts passes through a stage.
    """
    size = torch.finfo(work.dtype).bits // 8
    trained = sum(p.size for p in held)
    state = sum(p.size * (work.matrix_state_bytes if p.matrix else 8) for p in held)
    on_host = section.cpu_offload
    tokens = rows * work.sequence_length / degrees.context
    inside, between = _tensor_shares(degrees, section)
    inputs = 4 * work.model.config.hidden_size  # of a layer, in float32
    token, layer = layer_bytes(work.kept, layers, checkpointing, inputs=0)
    passing = tokens * inside * (in_flight * token + layer) + in_flight * tokens * work.kept.around * between
    if checkpointing != "none":
        passing += in_flight * tokens * len(layers) * inputs * between
    if degrees.context > 1 and section.context_method == "all_gather":  # keys and values of whole rows
        c = work.model.config
        row = rows * work.sequence_length * 2 * c.num_key_value_heads * c.head_dim * size / degrees.tensor
        several = 1 if checkpointing == "full" else in_flight * len(layers)
        passing += several * row * (1 - 1 / degrees.context)
    head = head_bytes(work.model, work.dtype, work.device) if last else 0
    if section.loss_parallel:
        head //= degrees.tensor
    passing, loss = round(passing), waste(work.model, work.device) - 1
    return Memory(
        parameters=0 if on_host else 4 * trained,
        gradients=0 if on_host else 4 * trained,
        optimizer=0 if on_host else state,
        gathered=_gathered(work, degrees, section, held, layers, size, checkpointing),
        activations=passing,
        head=head,
        kv_cache=_kv_cache(work, degrees),
        margin=round(loss * (passing + head)),
        reserve=RESERVE + (COMMUNICATION if degrees.world > 1 and work.device.type != "cpu" else 0),
    )


def _tensor_shares(degrees: Degrees, section: ParallelSection) -> tuple[float, float]:
    """Of the activations inside layers and between them, what is left on one of the tensor ranks. Without
    `sequence_parallel` norms and their inputs, about a quarter of a layer's, stay whole."""
    n = degrees.tensor
    return (1 / n, 1 / n) if n == 1 or section.sequence_parallel else (0.25 + 0.75 / n, 1.0)


def _gathered(
    work: Workload,
    degrees: Degrees,
    section: ParallelSection,
    held: Sequence[Part],
    layers: range,
    size: int,
    checkpointing: Checkpointing,
) -> int:
    by_layer = {i: sum(p.gathered for p in held if p.where == i) for i in layers}
    largest = max(by_layer.values(), default=0)
    around = sum(p.gathered for p in held if p.where is None)
    if degrees.shard * degrees.context == 1 and not section.cpu_offload:
        # autograd keeps the weights in the dtype of the arithmetic
        copies = [work.kept.copies[i] // degrees.tensor for i in layers]
        return sum(copies) if checkpointing == "none" else max(copies, default=0)
    weight = 4 if section.gather_dtype == "float32" else size
    reduced = 4 if section.reduce_dtype == "float32" else size
    units = 2 * largest if section.reshard_after_forward else sum(by_layer.values())  # the next is gathered meanwhile
    gradients = largest * (weight + reduced) + 4 * around
    return units * weight + gradients + 4 * around


def _kv_cache(work: Workload, degrees: Degrees) -> int:
    """What the engine keeps while an rl stage samples, in the dtype of the arithmetic; each rank samples its share."""
    c = work.model.config
    token = 2 * len(work.kept.layers) * c.num_key_value_heads * c.head_dim * (torch.finfo(work.dtype).bits // 8)
    sequences = -(-work.rollout_sequences // (degrees.data or 1))
    return token * work.sequence_length * sequences
