"""Weights of few bits, by rounding to the nearest (no data needed).

int8 has one scale for each output; int4 one for each output and group of 32 inputs, with the largest of the group at
the end of the range, as in llama.cpp's Q4_0. This is the portable leaf: it computes with the dequantized weight.
`nn.packed` runs the same numbers through integer products.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoworks.nn.linear import Linear
from nanoworks.nn.moe import MoE

Precision = Literal["int8", "int4"]

INT4_GROUP = 32
_PART = 2**17  # numbers rounded at once


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
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), 1, device=weight.device)
    for part, out, scale in _in_parts(weight, values, scales):
        x = part.float()
        torch.div(x.abs().amax(1, keepdim=True), 127, out=scale)
        out.copy_((x / _no_zero(scale)).round_())
    return values, scales


def round_int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """(N, K) -> values int8 (N, K) within -8..7 and scales (N, ceil(K / group)), rounded to float16."""
    N, K = weight.shape
    values = torch.empty(N, K, dtype=torch.int8, device=weight.device)
    scales = torch.empty(N, -(-K // group), device=weight.device)
    for part, out, scale in _in_parts(weight, values, scales):
        x = part.float()
        grouped = (F.pad(x, (0, -K % group)) if K % group else x).view(len(x), -1, group)
        largest = grouped.gather(2, grouped.abs().argmax(2, keepdim=True))
        scale.copy_((largest / -8).half().squeeze(2))
        rounded = (grouped / _no_zero(scale)[..., None]).round_().clamp_(-8, 7)
        out.copy_(rounded.flatten(1)[:, :K])
    return values, scales


def _in_parts(weight: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut all tensors into the same rows, few enough for a processor's cache to hold them between two operations."""
    rows = max(1, _PART // weight.size(1)) if weight.device.type == "cpu" else len(weight)
    return zip(*(tensor.detach().split(rows) for tensor in (weight, *others)), strict=True)


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
