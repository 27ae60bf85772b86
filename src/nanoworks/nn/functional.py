"""The arithmetic of a training step: linear, RMS norm, ReLU squared, rotary embedding, causal attention.

Each function is its PyTorch counterpart with a faster path for CPU training: fewer passes over memory in
the backward, and oneDNN's matrix product (see `onednn`). The fast path gives the same numbers up to rounding
and is taken only for plain CPU tensors; everything else (CUDA, DTensor, torch.compile) goes to PyTorch.
Shapes: B batch, T tokens, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from nanoworks.nn import onednn
from nanoworks.nn.onednn import matmul_nt


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` for x (..., in), weight (out, in), bias (out,)."""
    given = (x, weight) if bias is None else (x, weight, bias)
    if not onednn.usable(*given):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


def linear_group(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """`[x @ w.T for w in weights]`, the projections of one input (q, k, v; gate, up) as one product."""
    if not onednn.usable(x, *weights):
        return [F.linear(x, w) for w in weights]
    return list(_LinearGroup.apply(x, *weights))


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, computed in float32, in x's dtype."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def relu_squared(x: Tensor) -> Tensor:
    """`max(x, 0)^2`."""
    return F.relu(x).square()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + D/2}) of x (..., H, D) by the angles of cos and sin (..., D/2).

    The half-split layout and direction of Hugging Face's Llama: `y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin`.
    """
    cos, sin = cos.to(x.dtype).unsqueeze(-2), sin.to(x.dtype).unsqueeze(-2)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Softmax attention where a token sees itself and what precedes it, exact on every path.

    q (B, T, H, D); k and v (B, T, Hkv, D) with Hkv dividing H; returns (B, T, H, D).
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    return y.transpose(1, 2)


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return matmul_nt(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            matmul_nt(grad, weight.t()).view(x.shape) if need_x else None,
            matmul_nt(grad.t(), x.reshape(-1, x.shape[-1]).t()) if need_weight else None,
            grad.sum(0) if need_bias else None,
        )


class _LinearGroup(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        weight = torch.cat(weights)
        ctx.save_for_backward(x, weight)
        ctx.sizes = [w.shape[0] for w in weights]
        return matmul_nt(x, weight).split(ctx.sizes, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = torch.cat([g.reshape(-1, g.shape[-1]) for g in grads], dim=-1)
        dx = matmul_nt(grad, weight.t()).view(x.shape) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1:]):
            return dx, *[None] * len(ctx.sizes)
        return dx, *matmul_nt(grad.t(), x.reshape(-1, x.shape[-1]).t()).split(ctx.sizes)
