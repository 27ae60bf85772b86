"""Causal attention for training on a CPU as matrix products over blocks of queries.

PyTorch's fused CPU attention works one head and one small tile at a time, far below the machine's rate for matrix
products. Here a block of queries meets all keys up to its own end in one product, and the probabilities are
kept for the backward. That costs N * T^2 / 2 numbers a layer, so it is for short rows.
Shapes: N = B * H heads of all rows, T tokens, D features a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from nanoworks.nn import onednn

MIN_TOKENS, MAX_TOKENS = 256, 1024
_LARGE = 96  # head size from which oneDNN's product pays, which takes one head at a time


def suits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether q, k, v may take this path and gain by it.

    bfloat16 always does in training; float32 where its products are large enough for oneDNN.
    """
    gains = q.dtype == torch.bfloat16 or (q.size(1) >= MIN_TOKENS and q.size(-1) >= _LARGE)
    return gains and q.size(1) <= MAX_TOKENS and onednn.trains_on_cpu(q, k, v)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """q (B, T, H, D), k and v (B, T, K, D) with K dividing H -> (B, T, H, D)."""
    group = q.size(2) // k.size(2)
    if group > 1:
        k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    return _CausalAttention.apply(q, k, v, q.size(-1) ** -0.5 if scale is None else scale)


class _CausalAttention(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.batch, ctx.scale = q.size(0), scale
        q, k, v = _heads_first(q), _heads_first(k), _heads_first(v)
        y = torch.empty_like(q)
        # Scores stay float32 up to the softmax, whatever the dtype; so they do in PyTorch's kernel.
        scaled_q, float_k = q.float() * scale, k.float()
        blocks = _blocks(q.size(1))
        future = torch.ones(blocks[0][1], blocks[0][1], dtype=torch.bool).triu_(1)
        probabilities = []
        for start, end in blocks:
            s = _products(scaled_q[:, start:end], float_k[:, :end].mT)
            s[:, :, start:].masked_fill_(future[: end - start, : end - start], float("-inf"))
            p = torch.softmax(s, dim=-1).to(q.dtype)
            y[:, start:end] = _products(p, v[:, :end])
            probabilities.append(p)
        ctx.save_for_backward(q, k, v, *probabilities)
        return _tokens_first(y, ctx.batch)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *probabilities = ctx.saved_tensors
        grad = _heads_first(grad)
        dq = torch.empty_like(q)
        dk, dv = torch.zeros(k.shape), torch.zeros(v.shape)  # sums over blocks, in float32
        for p, (start, end) in zip(probabilities, _blocks(q.size(1)), strict=True):
            dy = grad[:, start:end]
            dv[:, :end] += _products(p.mT, dy)
            dp = _products(dy, v[:, :end].mT)
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
            dq[:, start:end] = _products(ds, k[:, :end])
            dk[:, :end] += _products(ds.mT, q[:, start:end])
        dq.mul_(ctx.scale)
        dk.mul_(ctx.scale)
        return *(_tokens_first(t.to(q.dtype), ctx.batch) for t in (dq, dk, dv)), None


def kept_probabilities(tokens: int) -> int:
    """How many numbers are kept for the backward for each head of a row of `tokens`."""
    return sum((end - start) * end for start, end in _blocks(tokens))


def _blocks(tokens: int) -> list[tuple[int, int]]:
    """Ranges of queries. Of a diagonal block half the work is wasted, of a small one the product is slow."""
    size = 256 if tokens >= 512 else 128
    return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _heads_first(t: Tensor) -> Tensor:
    """(B, T, H, D) -> (N, T, D), contiguous."""
    return t.transpose(1, 2).flatten(0, 1).contiguous()


def _tokens_first(t: Tensor, batch: int) -> Tensor:
    """(N, T, D) -> (B, T, H, D)."""
    return t.unflatten(0, (batch, -1)).transpose(1, 2)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` for each of N matrices; oneDNN's float32 product has no batched form."""
    if min(a.size(1), a.size(2), b.size(2)) >= _LARGE and onednn.usable(a, b):
        return torch.stack([onednn.matmul_nt(left, right.mT) for left, right in zip(a, b, strict=True)])
    return torch.bmm(a, b)
