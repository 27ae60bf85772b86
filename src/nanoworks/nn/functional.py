"""The arithmetic of a layer: linear, RMS norm, squared ReLU, rotary embedding, causal attention.

Each function is its PyTorch counterpart with a faster path for training on a CPU: oneDNN's float32 product,
and backward passes written by hand that read and write memory fewer times. The fast path computes in the
same precision and is taken only for plain CPU tensors; everything else (CUDA, DTensor, torch.compile, autocast)
goes to PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from nanoworks.nn import blocked_attention, onednn
from nanoworks.nn.onednn import matmul_nt


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` for x (..., in), weight (out, in), bias (out,)."""
    operands = (x, weight) if bias is None else (x, weight, bias)
    return _Linear.apply(x, weight, bias) if onednn.usable(*operands) else F.linear(x, weight, bias)


def linear_group(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """`[x @ w.T for w in weights]`: the projections of one input (q, k, v; gate, up) as one product."""
    if not onednn.usable(x, *weights):
        return [F.linear(x, w) for w in weights]
    return list(_LinearGroup.apply(x, *weights))


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`x[begin:end] @ weight[e].T` for each group of rows; x (M, in), weight (E, out, in), ends (E,) int32 -> (M, out).

    PyTorch's grouped product wants rows of whole 16 bytes; other sizes are padded with zeros.
    """
    lanes = 16 // x.element_size()
    out, short = weight.size(1), -weight.size(2) % lanes
    if short or out % lanes:
        x, weight = F.pad(x, (0, short)), F.pad(weight, (0, short, 0, -out % lanes))
    return F.grouped_mm(x, weight.mT, offs=ends)[:, :out]


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, computed in float32, in x's dtype."""
    if onednn.trains_on_cpu(x) and (weight is None or onednn.plain_cpu(weight)):
        return _RMSNorm.apply(x, weight, eps)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def relu_squared(x: Tensor) -> Tensor:
    """`max(x, 0)^2`."""
    return _ReLUSquared.apply(x) if onednn.trains_on_cpu(x) else F.relu(x).square()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + D/2}) of x (..., H, D) by the angles of cos and sin (..., D/2).

    The half-split layout and direction of Hugging Face's Llama: `y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin`.
    """
    cos = torch.cat([cos, cos], dim=-1).to(x.dtype).unsqueeze(-2)
    sin = torch.cat([-sin, sin], dim=-1).to(x.dtype).unsqueeze(-2)
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, dims=-1), sin)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Softmax attention in which a token sees itself and the tokens before it.

    q (B, T, H, D); k and v (B, T, K, D) with K dividing H; scale defaults to D ** -0.5. Returns (B, T, H, D).
    """
    if blocked_attention.suits(q, k, v):
        return blocked_attention.causal_attention(q, k, v, scale)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    grouped = q.size(1) != k.size(1)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    return y.transpose(1, 2)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention where `mask`, boolean and broadcastable to (B, H, T, C), says who sees whom.

    q (B, T, H, D); k and v (B, C, K, D) with K dividing H; `softcap` and `sinks` (H,) as in
    `ForwardContext.attend`. Returns (B, T, H, D).
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if softcap is None and sinks is None:
        grouped = q.size(1) != k.size(1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
        return y.transpose(1, 2)
    group = q.size(1) // k.size(1)
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (q @ k.mT).float() * (q.size(-1) ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        sink = sinks.float().view(1, -1, 1, 1).expand(scores.size(0), -1, scores.size(2), 1)
        scores = torch.cat([scores, sink], dim=-1)
    p = torch.softmax(scores, dim=-1)[..., : k.size(2)].to(q.dtype)
    return (p @ v).transpose(1, 2)


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return matmul_nt(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            matmul_nt(grad, weight.t()) if need_x else None,
            _weight_grad(grad.flatten(0, -2), x.flatten(0, -2)) if need_weight else None,
            grad.flatten(0, -2).sum(0) if need_bias else None,
        )


class _LinearGroup(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        weight = torch.cat(weights)
        ctx.save_for_backward(x, weight)
        ctx.sizes = [w.size(0) for w in weights]
        return matmul_nt(x, weight).split(ctx.sizes, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = torch.cat(grads, dim=-1)
        dx = matmul_nt(grad, weight.t()) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1:]):
            return dx, *[None] * len(ctx.sizes)
        return dx, *_weight_grad(grad.flatten(0, -2), x.flatten(0, -2)).split(ctx.sizes)


def _weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    """`grad.T @ x`, (out, in). oneDNN runs a product of this kind faster with the longer side last."""
    if grad.size(1) > x.size(1):
        return matmul_nt(x.t(), grad.t()).t()
    return matmul_nt(grad.t(), x.t())


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = norm.square_().mul_(1 / x.size(-1)).add_(eps).rsqrt_()
        unit = x * inverse
        y = (unit if weight is None else unit * weight).to(x.dtype)
        ctx.save_for_backward(y if weight is None else unit.to(x.dtype), inverse, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        unit, inverse, weight = ctx.saved_tensors
        dweight = None
        if weight is not None:
            if ctx.needs_input_grad[1]:
                dweight = (grad * unit).flatten(0, -2).sum(0).to(weight.dtype)
            grad = grad * weight
        along = (grad * unit).mean(-1, keepdim=True, dtype=torch.float32)
        # The norm removes the component of the gradient along its output and scales the rest.
        dx = torch.addcmul(grad, unit, along.to(grad.dtype), value=-1).mul_(inverse)
        return dx.to(unit.dtype), dweight, None


class _ReLUSquared(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = torch.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return (grad * positive).mul_(2)


def sigmoid(x: Tensor) -> Tensor:
    """Logistic function, the same bits for an element wherever it lies: at the end of an array PyTorch's own rounds
    otherwise on a CPU, so what a token gets would depend on how many others there are."""
    return torch.tanh(x.float() / 2).add(1).div(2).to(x.dtype)
