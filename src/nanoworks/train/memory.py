"""Estimates a training step's memory before it starts, and refuses what cannot fit.

Parameters, gradients and optimizer states are exact; activations are what our layers keep for backward,
per token, plus the largest transient (the chunk of logits). Bytes throughout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanoworks.common.errors import UserError
from nanoworks.models import Decoder
from nanoworks.nn import blocked_attention
from nanoworks.nn.cross_entropy import default_chunk

RESERVE = 300 * 2**20  # the process itself: interpreter, libraries, batches prepared ahead


@dataclass(frozen=True)
class MemoryEstimate:
    parameters: int
    gradients: int
    optimizer: int
    activations_per_row: int
    transient: int

    def total(self, rows: int) -> int:
        return (
            self.parameters
            + self.gradients
            + self.optimizer
            + rows * self.activations_per_row
            + self.transient
            + RESERVE
        )


def estimate_memory(
    model: Decoder,
    *,
    sequence_length: int,
    dtype: torch.dtype,
    device: torch.device,
    activation_checkpointing: bool,
    matrix_state_bytes: int,
) -> MemoryEstimate:
    """Estimate for one device; `dtype` is that of the arithmetic, `matrix_state_bytes` the optimizer's."""
    T = sequence_length
    c = model.config
    parameters = sum(p.numel() * 4 for p in model.parameters())
    groups = model.param_groups()
    matrices = sum(p.numel() for _, p in groups["matrix"])
    rest = sum(p.numel() for _, p in model.named_parameters()) - matrices
    size = torch.finfo(dtype).bits // 8
    attention = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    # float32 residual stream and norms; projections, rotated heads, attention and MLP in the compute dtype
    token = 4 * 4 * c.hidden_size + size * (3 * attention + 2 * c.hidden_size + 3 * c.intermediate_size)
    layer = token * T
    if device.type == "cpu" and T <= blocked_attention.MAX_TOKENS:  # which keeps its probabilities
        layer += size * c.num_attention_heads * blocked_attention.kept_probabilities(T)
    if activation_checkpointing:
        kept = 4 * c.hidden_size * T * c.num_hidden_layers + layer
    else:
        kept = layer * c.num_hidden_layers
    kept += layer  # the gradients of one layer's activations, while its backward runs
    return MemoryEstimate(
        parameters=parameters,
        gradients=parameters,
        optimizer=matrix_state_bytes * matrices + 8 * rest,
        activations_per_row=kept + 6 * 4 * c.hidden_size * T,
        transient=4 * c.vocab_size * (3 * default_chunk(c.vocab_size, device) + c.hidden_size),
    )


def require_memory(estimate: MemoryEstimate, *, rows: int, available: int) -> None:
    """UserError naming the micro-batch that would fit when `rows` does not."""
    if estimate.total(rows) <= available:
        return
    fixed = estimate.total(0)
    fitting = (available - fixed) // estimate.activations_per_row
    need, have = estimate.total(rows) / 2**30, available / 2**30
    if fitting >= 1:
        fix = f"train.micro_batch_size={fitting} would fit"
    else:
        fix = f"not even one row fits ({estimate.total(1) / 2**30:.1f} GiB): take a smaller model or shorter rows"
    raise UserError(f"a micro-batch of {rows} rows needs about {need:.1f} GiB, {have:.1f} GiB are free; {fix}")
