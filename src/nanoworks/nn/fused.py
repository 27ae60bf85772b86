"""Inference with fewer and larger matrix products: q, k and v as one matrix, gate and up as another.

What `nn.pack` does for the CPU kernels, for PyTorch's own. A result differs from the plain model's by the order of
floating-point sums at most.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import nn

from nanoworks.nn.linear import Linear, Slice

_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of leaves that a module applies to the same input."""


def fuse(model: nn.Module) -> nn.Module:
    """Return a model that computes what `model` does; `model` stays as it is.

    Fused weights are copies, in the dtype they are used in; all others are shared with `model`.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    model = copy.deepcopy(model, cast("dict[int, Any]", shared))  # new modules around the same tensors
    for parent in list(model.modules()):
        for names in _GROUPS:
            leaves = [getattr(parent, name, None) for name in names]
            if all(type(leaf) is Linear for leaf in leaves):
                for name, part in zip(names, _slices(cast("list[Linear]", leaves)), strict=True):
                    setattr(parent, name, part)
    return model


@torch.no_grad()
def _slices(leaves: list[Linear]) -> list[Slice]:
    dtype = leaves[0].compute_dtype or leaves[0].weight.dtype
    sizes = tuple(leaf.weight.size(0) for leaf in leaves)  # of a shard, fewer than out_features
    weight = torch.cat([leaf.weight.to(dtype) for leaf in leaves])
    whole = Linear(leaves[0].weight.size(1), sum(sizes), bias=False, device="meta")
    whole.compute_dtype = leaves[0].compute_dtype
    whole.weight = nn.Parameter(weight, requires_grad=False)
    if any(leaf.bias is not None for leaf in leaves):
        biases = [
            weight.new_zeros(n) if leaf.bias is None else leaf.bias.to(dtype)
            for n, leaf in zip(sizes, leaves, strict=True)
        ]
        whole.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return [Slice(whole, sizes, i) for i in range(len(sizes))]
