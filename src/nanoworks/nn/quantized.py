"""Weights of few bits, by rounding to the nearest (no data needed).

int8 has one scale for each output; int4 one for each output and group of 32 inputs, with the largest of the group at
the end of the range, as in llama.cpp's Q4_0. This is the portable leaf: it computes with the dequantized weight.
`nn.packed` runs the same numbers through integer products.
"""

from __future__ import annotations

import copy
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoworks.nn.linear import Linear
from nanoworks.nn.moe import MoE

Precision = Literal["int8", "int4"]

INT4_GROUP = 32


class QuantizedLinear(nn.Module):
    """A linear leaf (`nn.linear.SwapLinear`) with weight `values * scales`.

    Args:
        values: (out_features, in_features) int8; within -8..7 for int4.
        scales: (out_features, G) float32, each for in_features / G inputs, the last group maybe shorter.
        group: inputs that share a scale; None for all of them, which is int8.
        bias: (out_features,) or None.
    """

    values: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, values: Tensor, scales: Tensor, *, group: int | None, bias: Tensor | None = None) -> None:
        super().__init__()
        self.group = group
        self.register_buffer("values", values)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)

    @classmethod
    def of(cls, weight: Tensor, precision: Precision, bias: Tensor | None = None) -> QuantizedLinear:
        """Round `weight` (out_features, in_features)."""
        if precision == "int8":
            values, scales = round_int8(weight)
            return cls(values, scales, group=None, bias=bias)
        values, scales = round_int4(weight, INT4_GROUP)
        return cls(values, scales, group=INT4_GROUP, bias=bias)

    @property
    def out_features(self) -> int:
        return self.values.size(0)

    @property
    def in_features(self) -> int:
        return self.values.size(1)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.dequantize().to(x.dtype), bias)

    def dequantize(self) -> Tensor:
        """(out_features, in_features) float32."""
        group = self.group or self.in_features
        return self.values * self.scales.repeat_interleave(group, dim=1)[:, : self.in_features]

    def shard(self, dim: int, rank: int, n: int) -> None:
        if dim == 1 and self.group is not None and self.in_features % (n * self.group):
            raise ValueError(f"{self.in_features} inputs cannot be cut into {n} slices of whole groups of {self.group}")
        self.values = self.values.chunk(n, dim)[rank].contiguous()
        if dim == 0 or self.group is not None:
            self.scales = self.scales.chunk(n, dim)[rank].contiguous()
        if dim == 0 and self.bias is not None:
            self.bias = self.bias.chunk(n)[rank].contiguous()


def round_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) -> values int8 (N, K) within -127..127 and scales (N, 1)."""
    weight = weight.detach().float()
    scales = weight.abs().amax(1, keepdim=True) / 127
    return (weight / _no_zero(scales)).round().to(torch.int8), scales


def round_int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """(N, K) -> values int8 (N, K) within -8..7 and scales (N, ceil(K / group)), rounded to float16."""
    weight = weight.detach().float()
    N, K = weight.shape
    grouped = F.pad(weight, (0, -K % group)).view(N, -1, group)
    largest = grouped.gather(2, grouped.abs().argmax(2, keepdim=True))
    scales = (largest / -8).half().float()
    values = (grouped / _no_zero(scales)).round().clamp(-8, 7).to(torch.int8)
    return values.flatten(1)[:, :K].contiguous(), scales.squeeze(2)


def _no_zero(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 1.0, scales)


def quantize_leaves(model: nn.Module, precision: Precision) -> nn.Module:
    """Return `model` with `QuantizedLinear` for its linear leaves but the routers'; `model` itself stays as it is."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    model = copy.deepcopy(model, cast("dict[int, Any]", shared))  # new modules around the same tensors
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Linear) and not (isinstance(parent, MoE) and name == "gate"):
                setattr(parent, name, QuantizedLinear.of(child.weight, precision, child.bias))
    return model
