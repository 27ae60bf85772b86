"""Seconds of a step by a stated model, of which docs/scaling.md gives the assumptions.

- Products: FLOPs over peak times the profile's `efficiency`; what lies between them reads and writes what autograd
  keeps a fixed number of times at the memory's bandwidth.
- A collective over n ranks moves (n - 1) / n of its bytes over the node's links and, where its ranks are on several
  nodes, (nodes - 1) / nodes of them over the network, which the group's ranks of a node share; the slower decides.
- FSDP2's and DDP's traffic hides behind arithmetic, save the first and the last layer; that of tensor, context and
  expert ranks does not.
- A pipeline waits as `parallel.pipeline_schedule.simulate` finds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch

from nanoworks.config.parallel import ParallelSection
from nanoworks.config.recipe import Checkpointing
from nanoworks.nn.moe import MoE
from nanoworks.parallel.mesh import ORDER, Degrees
from nanoworks.train.plan.hardware import Cluster
from nanoworks.train.plan.shares import Part
from nanoworks.train.plan.workload import Workload

if TYPE_CHECKING:
    from nanoworks.parallel.pipeline_schedule import Bubble

PASSES_EAGER, PASSES_COMPILED = 14, 6
"""How often what is kept for backward is read or written in all, between the products. docs/scaling.md holds what comes
of it against published figures of 8B parameters on H100s."""
KERNELS_EAGER, KERNELS_COMPILED = 120, 40
"""Of a layer, forward and backward: small micro-batches wait for the host that starts them."""
LAUNCH_SECONDS = 5e-6
MEMORY_EFFICIENCY = 0.8


@dataclass(frozen=True)
class Seconds:
    """Of one step, on the busiest rank."""

    products: float
    elementwise: float
    tensor: float
    context: float
    expert: float
    data: float
    """FSDP2's and DDP's traffic that nothing hides."""
    pipeline: float
    """Waiting for other stages, and handing over."""
    optimizer: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in a step, by what for."""

    data: float
    tensor: float
    context: float
    expert: float
    pipeline: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


class Network:
    """Times of collectives along the dimensions of a mesh."""

    def __init__(self, cluster: Cluster, degrees: Degrees) -> None:
        self._hardware, self._degrees = cluster.hardware, degrees

    def seconds(self, whole_bytes: float, *dims: str) -> float:
        """Of an all-gather (or reduce-scatter, or all-to-all) over `dims` whose result has `whole_bytes`."""
        n = math.prod(getattr(self._degrees, dim) for dim in dims)
        return self.among(
            whole_bytes, n, math.prod(getattr(self._degrees, x) for x in ORDER[ORDER.index(dims[-1]) + 1 :])
        )

    def among(self, whole_bytes: float, n: int, stride: int) -> float:
        """The same over `n` ranks, each `stride` from the next."""
        if n == 1:
            return 0.0
        hw = self._hardware
        local = min(n, max(1, hw.devices_per_node // stride))
        nodes = math.ceil(n / local)
        inside = whole_bytes * (n - 1) / n / (hw.link_gbs * 1e9)
        between = whole_bytes * (nodes - 1) / nodes / (local * hw.network_gbs * 1e9)
        latency = hw.latency_us * 1e-6 * (math.ceil(math.log2(local)) + 2 * math.ceil(math.log2(nodes)))
        return max(inside, between) + latency

    def hop(self, size: float) -> float:
        """Handing `size` bytes to the next pipeline stage."""
        d, hw = self._degrees, self._hardware
        near = d.world // d.pipeline < hw.devices_per_node and d.world <= hw.devices_per_node
        return size / ((hw.link_gbs if near else hw.network_gbs) * 1e9) + hw.latency_us * 1e-6 * (1 if near else 2)


def step_seconds(
    work: Workload,
    cluster: Cluster,
    degrees: Degrees,
    section: ParallelSection,
    stages: list[list[Part]],
    bounds: Sequence[range],
    *,
    rows: int,
    micro_batches: int,
    checkpointing: Checkpointing,
    peak: float,
) -> tuple[Seconds, Traffic, Bubble | None]:
    """(seconds of a step, bytes sent, how a pipeline's ranks wait); `stages` are the parts of each stage."""
    hw, d, n = cluster.hardware, degrees, degrees.tensor
    network = Network(cluster, d)
    size = torch.finfo(work.dtype).bits // 8
    config = work.model.config
    tokens = rows * work.sequence_length / d.context
    again = checkpointing != "none"  # what recomputing repeats: all, or what is not products
    passes = 3 + again  # forward, twice that backward, and the forward again
    multiplied = 3 + (checkpointing == "full")
    bandwidth = hw.memory_gbs * 1e9 * MEMORY_EFFICIENCY
    head = work.costs.head / (n if section.loss_parallel else 1)

    def stage_time(layers: range, *, last: bool) -> tuple[float, float]:
        """(products, elementwise) of a micro-batch, forward and backward."""
        flops = multiplied * sum(work.costs.layers[i] for i in layers) / n + (3 * head if last else 0)
        compiled = work.recipe.hardware.compile
        touched = PASSES_COMPILED if compiled else PASSES_EAGER
        share = 1 / n if section.sequence_parallel else 0.25 + 0.75 / n if n > 1 else 1.0
        bytes_ = touched * passes / 3 * share * sum(work.kept.layers[i] for i in layers)
        products, elementwise = tokens * flops / (peak * hw.efficiency), tokens * bytes_ / bandwidth
        kernels = len(layers) * (KERNELS_COMPILED if compiled else KERNELS_EAGER) * passes / 3
        return products, max(elementwise, kernels * LAUNCH_SECONDS - products)

    times = [stage_time(layers, last=i + 1 == len(bounds)) for i, layers in enumerate(bounds)]
    slowest = max(range(len(times)), key=lambda i: sum(times[i]))
    products, elementwise = times[slowest]
    layers, held = bounds[slowest], stages[slowest]

    hidden = tokens * config.hidden_size
    tensor_bytes = 4 * len(layers) * (1 + again / 2) * 2 * hidden * size if n > 1 else 0.0
    tensor = tensor_bytes and network.seconds(tensor_bytes, "tensor")
    if tensor:  # each of so many collectives begins anew
        tensor += (4 * len(layers) - 1) * network.seconds(0, "tensor")
    kv = 2 * tokens * d.context * config.num_key_value_heads * config.head_dim * size / n
    context_bytes = (2 + again) * len(layers) * kv if d.context > 1 else 0.0
    context = context_bytes and network.seconds(context_bytes, "context")

    mixtures = [m for i in layers for m in work.model.layers[i].modules() if isinstance(m, MoE)]
    expert_bytes = sum((4 + 2 * again) * hidden * size * m.top_k for m in mixtures) if d.expert > 1 else 0.0
    expert = expert_bytes and network.among(expert_bytes, d.expert, d.context * d.tensor)

    compute = products + elementwise + tensor + context + expert
    data, data_bytes = _data_seconds(work, d, section, held, network, compute, micro_batches, size)
    busy = micro_batches * compute
    pipeline, pipeline_bytes, found = 0.0, 0.0, None
    if d.pipeline > 1:
        forward = [sum(t) / passes for t in times]
        send = 4 * hidden / (n if section.sequence_parallel else 1)
        hop = network.hop(send)
        found = _waits(section.pipeline_schedule, d.pipeline, forward, micro_batches, passes - 1, hop)
        per_rank = len(bounds) // d.pipeline
        extra = micro_batches * (tensor + context + expert) * per_rank
        pipeline = max(0.0, found.seconds + extra - per_rank * busy)
        products, elementwise, tensor = (per_rank * t for t in (products, elementwise, tensor))
        context, expert = per_rank * context, per_rank * expert
        pipeline_bytes = 2 * micro_batches * send * per_rank
    seconds = Seconds(
        products=micro_batches * products,
        elementwise=micro_batches * elementwise,
        tensor=micro_batches * tensor,
        context=micro_batches * context,
        expert=micro_batches * expert,
        data=data,
        pipeline=pipeline,
        optimizer=_optimizer_seconds(work, d, held, bandwidth, peak * hw.efficiency),
    )
    traffic = Traffic(
        data=data_bytes,
        tensor=micro_batches * tensor_bytes,
        context=micro_batches * context_bytes,
        expert=micro_batches * expert_bytes,
        pipeline=pipeline_bytes,
    )
    return seconds, traffic, found


def _waits(schedule: str, ranks: int, forward: list[float], micro_batches: int, backward: float, hop: float) -> Bubble:
    """A step of a pipeline, simulated; of many micro-batches the first ones, as the others take the same time each."""
    from nanoworks.parallel.pipeline_schedule import Bubble, check_micro_batches, simulate  # imports for a second

    check_micro_batches(schedule, ranks, micro_batches)
    few, more = (
        simulate(schedule, ranks, forward, min(n, micro_batches), backward=backward, send=hop)
        for n in (2 * ranks, 4 * ranks)
    )
    left = micro_batches - 4 * ranks
    if left <= 0:
        return more
    seconds = more.seconds + left * (more.seconds - few.seconds) / (2 * ranks)
    busy = micro_batches * sum(forward) * (1 + backward)
    grows = left * (more.in_flight - few.in_flight) // (2 * ranks)
    return Bubble(seconds, 1 - busy / (ranks * seconds), more.in_flight + grows)


def _data_seconds(
    work: Workload,
    d: Degrees,
    section: ParallelSection,
    held: list[Part],
    network: Network,
    compute: float,
    micro_batches: int,
    size: int,
) -> tuple[float, float]:
    """(seconds that nothing hides, bytes) of gathering layers and summing gradients in a step."""
    seconds = total = 0.0
    weight = 4 if section.gather_dtype == "float32" else size
    reduced = 4 if section.reduce_dtype == "float32" else size
    gathers = 2 if section.reshard_after_forward else 1
    neighbours = d.context * d.tensor
    kinds = [(False, d.replicate, d.shard * d.context, d.tensor)]
    if d.expert > 1:
        kinds.append((True, *d.same_experts, d.expert * neighbours))
    for experts, copies, shards, stride in kinds:
        own = [p for p in held if d.expert == 1 or (".experts." in p.name) == experts]
        by_layer = [sum(p.gathered for p in own if p.where == i) for i in {p.where for p in own}]
        elements, largest = sum(by_layer), max(by_layer, default=0)
        if shards > 1 or section.cpu_offload:
            moved = elements * (gathers * weight + reduced)
            latency = (gathers + 1) * len(by_layer) * network.among(0, shards, stride)
            ends = network.among(largest * (weight + reduced), shards, stride)
            seconds += micro_batches * max(ends, network.among(moved, shards, stride) + latency - compute)
            total += micro_batches * moved
            elements = sum(p.size for p in own)
        if copies > 1:  # once a step; an all-reduce is a reduce-scatter and an all-gather
            traffic = 2 * network.among(4 * elements, copies, shards * stride)
            first = 2 * network.among(4 * min(elements, largest), copies, shards * stride)
            seconds += max(first, traffic - compute * 2 / 3)
            total += 8 * elements
    return seconds, total


def _optimizer_seconds(work: Workload, d: Degrees, held: list[Part], bandwidth: float, rate: float) -> float:
    """Reading and writing of parameters, gradients and state; for Muon five steps of Newton and Schulz besides, spread
    over the ranks that share a matrix."""
    seconds = sum(p.size for p in held) * 28 / bandwidth
    if work.orthogonalises:
        spread = d.shard * d.context * d.tensor
        named = dict(work.model.named_parameters())
        for part in held:
            if part.matrix:
                shape = named[part.name].shape
                small, large = sorted(shape[-2:])
                seconds += 5 * (4 * small**2 * large + 2 * small**3) * math.prod(shape[:-2]) / spread / rate
    return seconds
