"""Estimates a training step's memory before it starts; `train.plan` adds what many devices change.

Parameters, gradients and optimizer states are exact; activations are what autograd keeps of a forward that is tried
out (`train.activations`); what comes and goes within the step is added where it is largest. Bytes throughout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanoworks.config.recipe import Checkpointing
from nanoworks.models import Decoder
from nanoworks.nn.cross_entropy import default_chunk
from nanoworks.nn.moe import MoE
from nanoworks.train.activations import Kept, trace_activations

RESERVE = 365 * 2**20  # the process itself: interpreter, libraries, batches prepared ahead; a GPU's context is like it


def waste(model: Decoder, device: torch.device) -> float:
    """What an allocator holds for each byte of tensors that come and go. On a CPU that is glibc's heap, whose holes are
    not of the sizes asked for next, least of all where experts get another number of rows each time (measured,
    `benchmarks/memory.py`); on a GPU the usual margin for fragmentation."""
    if device.type != "cpu":
        return 1.1
    return 1.8 if any(isinstance(module, MoE) for module in model.modules()) else 1.4


@dataclass(frozen=True)
class MemoryEstimate:
    """Of one device. A step is largest at the end of a forward, when all activations are there and the head's loss is
    computed, or in the backward after it, when a layer's gradients are added to that."""

    parameters: int
    gradients: int
    optimizer: int
    activations_per_row: int
    copies: int
    """Of weights, in the dtype of the arithmetic, that autograd keeps."""
    head: int
    """At the end of the forward: logits, and the gradient of the head's matrix."""
    layer_per_row: int
    """In the backward: what one layer computes anew, and the gradients of its activations."""
    waste: float
    """As `waste` says."""

    def total(self, rows: int) -> int:
        """With a micro-batch of `rows` rows, in a step of several."""
        return self.lasting + RESERVE + self.passing(rows)

    @property
    def lasting(self) -> int:
        """What is there from step to step."""
        return self.parameters + self.gradients + self.optimizer

    def passing(self, rows: int) -> int:
        """What comes and goes with each micro-batch."""
        return round(self.copies + self.waste * (rows * (self.activations_per_row + self.layer_per_row) + self.head))


def estimate_memory(
    model: Decoder,
    *,
    sequence_length: int,
    dtype: torch.dtype,
    device: torch.device,
    activation_checkpointing: Checkpointing,
    matrix_state_bytes: int,
    documents: bool = False,
) -> MemoryEstimate:
    """Estimate for one device; `dtype` is that of the arithmetic, `matrix_state_bytes` the optimizer's.

    `documents`: attention stays inside documents (`data.document_mask`).
    """
    kept = trace_activations(model, sequence_length=sequence_length, dtype=dtype, device=device, documents=documents)
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    matrices = sum(p.numel() for role, g in model.param_groups().items() for _, p in g if role.startswith("matrix"))
    others = sum(p.numel() for p in model.parameters() if p.requires_grad) - matrices
    around, layer = per_row(model, kept, sequence_length, activation_checkpointing)
    return MemoryEstimate(
        parameters=parameters,
        gradients=trained,
        optimizer=matrix_state_bytes * matrices + 8 * others,
        activations_per_row=around,
        copies=sum(kept.copies) if activation_checkpointing == "none" else max(kept.copies),
        head=head_bytes(model, dtype, device),
        layer_per_row=layer,
        waste=waste(model, device),
    )


def per_row(
    model: Decoder, kept: Kept, sequence_length: int, activation_checkpointing: Checkpointing
) -> tuple[int, int]:
    """(kept by all layers and around them, needed besides while one layer's backward runs) for a row."""
    inputs = 4 * model.config.hidden_size  # of a layer, in float32
    token, layer = layer_bytes(kept, range(len(kept.layers)), activation_checkpointing, inputs=inputs)
    return sequence_length * (kept.around + token), sequence_length * layer


def layer_bytes(kept: Kept, layers: range, activation_checkpointing: Checkpointing, *, inputs: int) -> tuple[int, int]:
    """For a token: (kept by `layers` from forward to backward, needed besides while one of them runs backward: what it
    computes again and the gradients of that). `inputs` are a layer's."""
    largest = max((kept.layers[i] for i in layers), default=0)
    if activation_checkpointing == "none":
        return sum(kept.layers[i] for i in layers), largest
    products = [kept.products[i] for i in layers] if activation_checkpointing == "selective" else []
    return len(layers) * inputs + sum(products), 2 * largest - max(products, default=0)


def head_bytes(model: Decoder, dtype: torch.dtype, device: torch.device) -> int:
    """A chunk of logits in three forms; the matrix in the dtype of the arithmetic, its gradient, what is added to that,
    and its copy in the order of the parameter."""
    c = model.config
    size = torch.finfo(dtype).bits // 8
    matrix = c.vocab_size * c.hidden_size
    copies = 4 + size + (size if size < 4 else 0) + (0 if c.tie_word_embeddings else 4)
    return 4 * c.vocab_size * 3 * default_chunk(c.vocab_size, device) + matrix * copies
