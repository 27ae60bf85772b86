"""Models and steps small enough to compare every strategy with a single process."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from nanoworks.config.parallel import ParallelSection
from nanoworks.config.recipe import Checkpointing
from nanoworks.models import Decoder, build_model, config_from_dict
from nanoworks.nn.context import DenseContext
from nanoworks.parallel import SingleDevice, Strategy
from nanoworks.train import muon
from nanoworks.train.optim import OPTIMIZERS, Optimizer

VOCAB, ROWS, TOKENS, STEPS = 64, 8, 16, 5
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES},
    "llama_tied": {"model_type": "llama", **SIZES, "tie_word_embeddings": True, "attention_bias": True},
    "mixtral": {"model_type": "mixtral", **SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral_2": {"model_type": "mixtral", **SIZES, "num_local_experts": 2, "num_experts_per_tok": 1},
    "qwen3": {"model_type": "qwen3", **SIZES, "head_dim": 8},
}
MODELS |= {f"{name}_deep": {**values, "num_hidden_layers": 4} for name, values in MODELS.items()}
"""With a layer for each of four pipeline stages."""
OPTIMIZATION: dict[str, dict[str, Any]] = {
    "adamw": {"lr": 1e-3},
    "muon_adamw": {"lr_matrix": 1e-3, "lr_embedding": 1e-3, "lr_unembedding": 1e-3, "lr_other": 1e-3},
    "muon_adamw_2026": {"lr_matrix": 1e-3, "lr_embedding": 1e-3, "lr_unembedding": 1e-3, "lr_scalar": 1e-3},
}


@dataclass(frozen=True)
class Rows:
    """A micro-batch, as a stage makes them."""

    tokens: Tensor
    targets: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> Rows:
        return self

    def part(self, index: int, n: int) -> Rows:
        return Rows(*(t.chunk(n)[index] for t in (self.tokens, self.targets, self.weights)))


@dataclass(frozen=True)
class Loss:
    sum: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Trained:
    losses: list[float]
    norms: list[float]
    parameters: dict[str, Tensor]
    state: dict[str, Tensor]


def model(name: str) -> Decoder:
    torch.manual_seed(0)
    built = build_model(config_from_dict(MODELS[name]))
    built.init_weights()
    return built


def data(step: int) -> Rows:
    """The rows of a step, some targets without weight."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCAB, (ROWS, TOKENS + 1), generator=generator)
    weights = (torch.rand(ROWS, TOKENS, generator=generator) > 0.2).float()
    return Rows(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), weights)


def compute(decoder: Decoder, batch: Rows) -> Loss:
    """The mean of the load-balancing loss depends on how rows are cut, so each row has its own here."""
    ctx = DenseContext(batch.tokens)
    loss = decoder.head.loss(decoder(batch.tokens, ctx), batch.targets, batch.weights)
    if ctx.routing:
        rows = batch.tokens.size(0)
        for routing in ctx.routing.values():
            for logits in routing.logits.view(rows, -1, routing.logits.size(1)):
                loss = loss + 0.1 * logits.softmax(-1).mean(0).square().sum()
    return Loss(loss)


def opened(
    section: ParallelSection, checkpointing: Checkpointing = "none", dtype: torch.dtype = torch.float32
) -> Strategy:
    """The strategy of the ranks that run this."""
    if section.strategy == "deepspeed":
        from nanoworks.parallel.deepspeed import DeepSpeed

        os.environ["LOCAL_RANK"] = str(torch.distributed.get_rank())
        return DeepSpeed(section, torch.device("cpu"), dtype, activation_checkpointing=checkpointing)
    from nanoworks.parallel.native import Native

    return Native(section, torch.device("cpu"), dtype, activation_checkpointing=checkpointing)


def adopted(strategy: Strategy, decoder: Decoder, optim: str) -> tuple[Decoder, Optimizer]:
    """Model and optimizer as a run has them."""
    decoder = strategy.prepare(decoder).train()
    cls = OPTIMIZERS.get(optim)
    return decoder, strategy.adopt(cls(decoder.param_groups(), cls.Options(**OPTIMIZATION[optim])))


# In bfloat16 the last bit of a gradient is a bit of bfloat16 of Muon's update, and soon another expert for a token: in
# one process two ways to cut the same rows into micro-batches part by 7.5e-4 in five steps.
@mock.patch.object(muon, "newton_schulz", functools.partial(muon.newton_schulz, dtype=torch.float32))
def train(
    name: str,
    optim: str = "adamw",
    section: ParallelSection | None = None,
    *,
    steps: range = range(STEPS),
    start: Trained | None = None,
    micro_batches: int | None = None,
    checkpointing: Checkpointing = "none",
    dtype: torch.dtype = torch.float32,
) -> Trained:
    """Take `steps` in this process or, given a section, on the ranks that run this; from `start`'s end, if given."""
    device = torch.device("cpu")
    strategy: Strategy
    if section is None:
        strategy = SingleDevice(device, activation_checkpointing=checkpointing)
    else:
        strategy = opened(section, checkpointing, dtype)
    decoder = model(name)
    if start is not None:
        decoder.load_state_dict(start.parameters, strict=False)
    decoder, optimizer = adopted(strategy, decoder, optim)
    optimizer.total_steps = STEPS
    if start is not None:
        optimizer.load_state_dict({name: start.state[name] for name in optimizer.state_dict()})
    losses, norms = [], []
    for step in steps:
        whole, mesh = data(step), strategy.mesh
        scale = 1.0 / float(whole.weights.sum())
        mine = whole.part(mesh.data_rank, mesh.data_world_size)
        micro_batches = micro_batches or max(2, mesh.degrees.pipeline)
        parts = [mine.part(i, micro_batches) for i in range(micro_batches)]
        optimizer.zero_grad()
        found = strategy.forward_backward(parts, compute, scale)
        [total] = strategy.sum([sum(float(loss.sum.detach()) for loss in found)])
        losses.append(total * scale)
        norms.append(strategy.clip(decoder, 0.5))
        strategy.step(optimizer, 1.0, step)
    return Trained(
        losses,
        norms,
        {n: t.clone() for n, t in strategy.wholes({n: p.detach() for n, p in decoder.named_parameters()})},
        {n: t.clone() for n, t in strategy.wholes(optimizer.state_dict())},
    )
