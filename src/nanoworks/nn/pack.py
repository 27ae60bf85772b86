"""From an ordinary model to one of `nn.packed`, which runs on the CPU kernels."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from nanoworks.nn.attention import Attention
from nanoworks.nn.head import Head
from nanoworks.nn.layer import PreNormLayer
from nanoworks.nn.linear import Linear
from nanoworks.nn.mlp import SquaredReLU, SwiGLU
from nanoworks.nn.moe import Experts, MoE
from nanoworks.nn.norm import RMSNorm
from nanoworks.nn.packed import (
    Dense,
    Matrix,
    PackedAttention,
    PackedExperts,
    PackedFeedForward,
    PackedLinear,
    PackedNorm,
    PackedStack,
    RoPETable,
)
from nanoworks.nn.quantized import Precision, QuantizedLinear
from nanoworks.nn.rope import RoPE

_SHARE = 32
"""Features of gate and of up in a panel, at most."""


def pack(model: nn.Module, *, quantize: Precision | None = None, consume: bool = False) -> nn.Module:
    """Return a model that computes what `model` does on the kernels.

    Args:
        model: on the CPU, its linear leaves float32 or bfloat16. It stays as it is unless `consume`.
        quantize: round the weights of all linear leaves but the routers'.
        consume: the caller gives the model away: it is changed in place and each weight freed once it is packed, so
            that no more than one copy of the weights and one matrix are in memory.
    """
    if not consume:
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        model = copy.deepcopy(model, cast("dict[int, Any]", shared))  # new modules around the same tensors
    embedding = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    stream = None if embedding is None else embedding.weight.dtype  # of what goes from layer to layer
    return _Packer(quantize, consume, stream).replace(model)


class _Packer:
    def __init__(self, quantize: Precision | None, consume: bool, stream: torch.dtype | None) -> None:
        self.quantize, self.consume, self.stream = quantize, consume, stream
        self.done: dict[int, nn.Module] = {}  # a module that serves in several places stays one

    def replace(self, module: nn.Module) -> nn.Module:
        if id(module) not in self.done:
            self.done[id(module)] = self._replacement(module)
        return self.done[id(module)]

    def _replacement(self, module: nn.Module) -> nn.Module:
        if isinstance(module, RMSNorm):
            return PackedNorm(module)
        if isinstance(module, RoPE):
            return RoPETable(module)
        if isinstance(module, Linear):
            return PackedLinear(self._matrix(module))
        if isinstance(module, Experts):
            return self._experts(module)
        # A class derived from one of these may compute something else: its parts are replaced one by one.
        if type(module) is Attention:
            projections = module.q_proj, module.k_proj, module.v_proj
            return PackedAttention(module, self._matrix(*projections), self._outer(module.o_proj))
        if type(module) is SwiGLU and (
            isinstance(module.down_proj, Linear) or module.gate_proj.out_features % _SHARE == 0
        ):
            inner = self._swiglu(self._weights(module.gate_proj), self._weights(module.up_proj))
            down: nn.Module = module.down_proj
            outer = self._down(self._weights(down)) if isinstance(down, Linear) else self.replace(down)
            return PackedFeedForward(inner, outer, glu=True)
        if type(module) is SquaredReLU:
            return PackedFeedForward(self._matrix(module.fc1), self._outer(module.fc2), glu=False)
        if isinstance(module, nn.ModuleList) and all(type(m).forward is PreNormLayer.forward for m in module):
            return self._stack(module)
        for name, child in module.named_children():
            if isinstance(module, Head) and name == "lm_head":
                setattr(module, name, PackedLinear(self._matrix(cast(Linear, child)), to_float=True))
            elif isinstance(module, MoE) and name == "gate":
                setattr(module, name, PackedLinear(self._weights(cast(Linear, child))))
            else:
                setattr(module, name, self.replace(child))
        return module

    def _stack(self, layers: nn.ModuleList) -> nn.ModuleList:
        """One module for all layers, if each is made of what the kernels know."""
        parts = []
        for layer in cast("list[PreNormLayer]", list(layers)):
            names = (layer.attention_norm, layer.attention_block, layer.feed_forward_norm, layer.feed_forward_block)
            for name in names:
                setattr(layer, name, self.replace(getattr(layer, name)))
            parts.append(tuple(getattr(layer, name) for name in names))
        if not parts or not all(map(self._fits, parts)):
            return layers
        return nn.ModuleList([PackedStack(parts)])

    def _fits(self, parts: tuple[nn.Module, ...]) -> bool:
        first, attention, second, block = parts
        return (
            isinstance(first, PackedNorm)
            and isinstance(second, PackedNorm)
            and isinstance(attention, PackedAttention)
            and isinstance(block, PackedFeedForward)
            and attention.after is None
            and block.after is None
            and all(dtype in (None, self.stream) for dtype in (attention.dtype, block.dtype))
        )

    def _weights(self, leaf: Linear) -> Dense:
        dtype = leaf.compute_dtype or leaf.weight.dtype
        dense = Dense(leaf.weight.detach().to(dtype), None if leaf.bias is None else leaf.bias.detach())
        if self.consume:
            leaf.weight = nn.Parameter(leaf.weight.new_empty(0), requires_grad=False)
        return dense

    def _matrix(self, *leaves: Linear) -> Matrix:
        """Leaves of the same input as one, quantized if that is asked for."""
        return self._rounded(_stacked([self._weights(leaf) for leaf in leaves]))

    def _rounded(self, dense: Dense) -> Matrix:
        if self.quantize is None:
            return dense
        return QuantizedLinear.of(dense.weight, self.quantize, dense.bias)

    def _outer(self, leaf: nn.Module) -> Matrix | nn.Module:
        return self._matrix(leaf) if isinstance(leaf, Linear) else self.replace(leaf)

    def _swiglu(self, gate: Dense, up: Dense) -> Matrix:
        """Gate and up as one matrix, with features of zeros to fill the last panel."""
        short = -gate.weight.size(0) % _SHARE
        return self._rounded(_stacked([_widen(gate, short), _widen(up, short)]))

    def _down(self, down: Dense) -> Matrix:
        short = -down.weight.size(1) % _SHARE
        return self._rounded(Dense(F.pad(down.weight, (0, short)), down.bias) if short else down)

    def _experts(self, experts: Experts) -> PackedExperts:
        leaves = experts.gate_proj, experts.up_proj, experts.down_proj
        dtype = leaves[0].compute_dtype or leaves[0].weight.dtype
        blocks = []
        for i in range(leaves[0].num_experts):
            gate, up, down = (Dense(leaf.weight[i].detach().to(dtype)) for leaf in leaves)
            blocks.append((self._swiglu(gate, up), self._down(down)))
        if self.consume:
            for leaf in leaves:
                leaf.weight = nn.Parameter(leaf.weight.new_empty(0), requires_grad=False)
        return PackedExperts(blocks)


def _stacked(parts: Sequence[Dense]) -> Dense:
    if len(parts) == 1:
        return parts[0]
    bias = None
    if any(part.bias is not None for part in parts):
        bias = torch.cat([p.weight.new_zeros(p.weight.size(0)) if p.bias is None else p.bias for p in parts])
    return Dense(torch.cat([part.weight for part in parts]), bias)


def _widen(dense: Dense, outputs: int) -> Dense:
    """With so many outputs of zero more."""
    if outputs == 0:
        return dense
    return Dense(
        F.pad(dense.weight, (0, 0, 0, outputs)), None if dense.bias is None else F.pad(dense.bias, (0, outputs))
    )
