"""The leaf modules that hold matrices, and the contract by which other leaves replace them.

Quantization, adapters and tensor parallelism swap or wrap leaves by name; whatever is swapped in keeps
the contract of `SwapLinear`, so models never learn of it.
"""

from __future__ import annotations

from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from nanoworks.nn import functional as NF


@runtime_checkable
class SwapLinear(Protocol):
    """What a model and the transforms above it may ask of any linear leaf."""

    in_features: int
    out_features: int

    def __call__(self, x: Tensor) -> Tensor: ...

    def dequantize(self) -> Tensor:
        """Return the weight as a plain (out_features, in_features) tensor."""
        ...

    def shard(self, dim: int, rank: int, n: int) -> None:
        """Keep the `rank`-th of `n` equal slices of the weight along `dim` (0 = outputs, 1 = inputs)."""
        ...


class Linear(nn.Linear):
    """`nn.Linear` through the fastest kernel for the device, with a compute dtype.

    With `compute_dtype` set, weight and input are cast to it at use while the parameter keeps its own
    dtype: float32 master weights, bfloat16 arithmetic, the same rounding as autocast.
    """

    compute_dtype: torch.dtype | None = None

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if self.compute_dtype is not None:
            x, weight = x.to(self.compute_dtype), weight.to(self.compute_dtype)
            bias = None if bias is None else bias.to(self.compute_dtype)
        return NF.linear(x, weight, bias)

    def dequantize(self) -> Tensor:
        return self.weight.detach()

    def shard(self, dim: int, rank: int, n: int) -> None:
        self.weight = nn.Parameter(self.weight.detach().chunk(n, dim)[rank].contiguous())
        if self.bias is not None and dim == 0:
            self.bias = nn.Parameter(self.bias.detach().chunk(n, 0)[rank].contiguous())


class GroupedLinear(nn.Module):
    """The linear leaves of E experts as one: `weight` (E, out_features, in_features), each expert on its own rows."""

    compute_dtype: torch.dtype | None = None

    def __init__(self, num_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, out_features
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        if not self.weight.is_meta:  # as in models.decoder.embedding
            nn.init.normal_(self.weight, std=in_features**-0.5)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x (M, in_features), sorted by expert -> (M, out_features); `ends` (E,) int32 is where each one's rows end."""
        dtype = self.compute_dtype or x.dtype
        return NF.grouped_linear(x.to(dtype), self.weight.to(dtype), ends)

    def dequantize(self) -> Tensor:
        return self.weight.detach()

    def shard(self, dim: int, rank: int, n: int) -> None:
        """Keep the `rank`-th of `n` equal slices along `dim` (0 = outputs, 1 = inputs) of every expert."""
        self.weight = nn.Parameter(self.weight.detach().chunk(n, dim + 1)[rank].contiguous())


class Slice(nn.Module):
    """Some outputs of a linear leaf that several were fused into (`nn.fused`); `project` applies them together."""

    def __init__(self, whole: Linear, sizes: tuple[int, ...], index: int) -> None:
        super().__init__()
        self.whole, self.sizes, self.index = whole, sizes, index

    def forward(self, x: Tensor) -> Tensor:
        return self.whole(x).split(self.sizes, dim=-1)[self.index]


def project(x: Tensor, *leaves: nn.Module) -> list[Tensor]:
    """Apply several linear leaves to one input; plain leaves share a single matrix product."""
    if all(isinstance(leaf, Slice) for leaf in leaves):
        slices = cast("tuple[Slice, ...]", leaves)
        whole, sizes = slices[0].whole, slices[0].sizes
        if all(leaf.whole is whole for leaf in slices):
            parts = whole(x).split(sizes, dim=-1)
            return [parts[leaf.index] for leaf in slices]
    if all(type(leaf) is Linear and leaf.bias is None for leaf in leaves):
        plain = cast("tuple[Linear, ...]", leaves)
        dtype = plain[0].compute_dtype or x.dtype
        return NF.linear_group(x.to(dtype), [leaf.weight.to(dtype) for leaf in plain])
    return [leaf(x) for leaf in leaves]


def set_compute_dtype(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Set the arithmetic dtype of every linear leaf (None: that of the input)."""
    for module in model.modules():
        if isinstance(module, (Linear, GroupedLinear)):
            module.compute_dtype = dtype
