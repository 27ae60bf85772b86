"""SwiGLU experts on a CPU, from tokens to tokens as one step of autograd.

PyTorch's grouped product calls a library once for each expert, and autograd around it reads and writes the rows of all
choices a dozen times. Here rows are gathered once and summed once in each direction, gate and up are one product, and
the products of all experts are

- in bfloat16, where a call has its price: one batched product; each expert gets as many rows as the busiest one;
- where that pads too much, and in float32: one product for each expert, in float32 by oneDNN (`nn.onednn`).

Shapes: N tokens, k choices a token, C features, E experts, I features inside an expert; R rows: the choices in the
order of their experts, with rows between them that belong to no choice (padding) where products are batched.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from nanoworks.nn import onednn
from nanoworks.nn.linear import GroupedLinear

_CALL = 1.5e6
"""Multiply-adds in bfloat16 that take as long as one more call of oneDNN."""
_MIN_ROWS = 64  # for fewer rows of an expert, MKL is as fast as oneDNN in float32


def suits(choices: int, x: Tensor, *leaves: GroupedLinear) -> bool:
    """Whether to compute plain `leaves` this way for N * k `choices` of x (N, C): in training on a CPU; without
    gradients only for many rows, because all matrices are copied."""
    return (
        (torch.is_grad_enabled() or choices >= _MIN_ROWS * leaves[0].num_experts)
        and all(type(leaf) is GroupedLinear for leaf in leaves)
        and onednn.plain_cpu(x)
        and onednn.plain_cpu(*[leaf.weight for leaf in leaves])
    )


def mixture(
    x: Tensor, weights: Tensor, experts: Tensor, dtype: torch.dtype, gate: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    """`sum_j weights[n, j] * down[e] (silu(gate[e] x[n]) * (up[e] x[n]))` with e = experts[n, j], computed in `dtype`.

    x is (N, C); weights and experts are (N, k), where the number E stands for a choice that is left out; gate and up
    are (E, I, C), down is (E, C, I). Returns (N, C) in x's dtype.
    """
    E, I, C = gate.shape
    choices = experts.flatten()
    order = choices.argsort(stable=True)
    counts = choices.bincount(minlength=E + 1)[:E]
    order = order[: int(counts.sum())]
    width = int(counts.max())
    padding = E * width - len(order)
    if dtype == torch.bfloat16 and padding * C * I <= E * _CALL:
        sizes, begins = [width] * E, torch.arange(E) * width
    else:
        sizes, begins = counts.tolist(), counts.cumsum(0) - counts
    shift = begins - (counts.cumsum(0) - counts)
    rows = torch.arange(len(order)) + shift.repeat_interleave(counts, output_size=len(order))
    row_of_choice = torch.zeros_like(choices).index_copy_(0, order, rows).view_as(experts)
    token_of_row = torch.zeros(sum(sizes), dtype=torch.long).index_copy_(0, rows, order // experts.size(1))
    taken = None if len(order) == len(choices) else experts < E
    return _Mixture.apply(x, weights, row_of_choice, taken, token_of_row, rows, order, sizes, dtype, gate, up, down)


class _Mixture(Function):
    """Padding holds the rows of some token. Its weight is zero, so that no gradient comes out of it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        row_of_choice: Tensor,
        taken: Tensor | None,
        token_of_row: Tensor,
        rows: Tensor,
        order: Tensor,
        sizes: list[int],
        dtype: torch.dtype,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
    ) -> Tensor:
        first = torch.empty(len(gate), 2 * gate.size(1), gate.size(2), dtype=dtype)
        for half, matrices in zip(first.chunk(2, dim=1), (gate, up), strict=True):
            half.copy_(matrices)
        last = down.to(dtype)
        inputs = F.embedding(token_of_row, x.to(dtype))  # reads rows faster than index_select
        g, u = _products(inputs, first.mT, sizes).chunk(2, dim=-1)
        h = F.silu(g).mul_(u)
        weights = weights.to(dtype)
        if taken is not None:
            weights = weights * taken
        row_weights = weights.new_zeros(len(inputs), 1).index_copy_(0, rows, weights.view(-1, 1).index_select(0, order))
        ctx.save_for_backward(inputs, g, u, h, row_weights, first, last, row_of_choice, taken, token_of_row)
        ctx.sizes, ctx.x_dtype = sizes, x.dtype
        y = _products(h, last.mT, sizes)
        return F.embedding_bag(row_of_choice, y, mode="sum", per_sample_weights=weights).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, g, u, h, row_weights, first, last, row_of_choice, taken, token_of_row = ctx.saved_tensors
        need_x, need_weights = ctx.needs_input_grad[:2]
        dy = F.embedding(token_of_row, grad.to(last.dtype))
        dh = _products(dy, last, ctx.sizes)
        dx = dweights = dgate = dup = ddown = None
        if need_weights:
            dweights = (dh * h).sum(-1, dtype=torch.float32).index_select(0, row_of_choice.flatten())
            dweights = dweights.view_as(row_of_choice)
            if taken is not None:
                dweights = dweights * taken
        dh.mul_(row_weights)
        both = torch.empty(len(inputs), 2 * dh.size(1), dtype=dh.dtype)
        dg, du = both.chunk(2, dim=-1)
        torch.mul(F.silu(g), dh, out=du)
        torch.ops.aten.silu_backward.grad_input(dh.mul_(u), g, grad_input=dg)
        if need_x:
            kept = None if taken is None else taken.to(dh.dtype)
            dinputs = _products(both, first, ctx.sizes)
            dx = F.embedding_bag(row_of_choice, dinputs, mode="sum", per_sample_weights=kept).to(ctx.x_dtype)
        if ctx.needs_input_grad[-1]:
            ddown = _weight_grads(dy, h * row_weights, ctx.sizes)
        if any(ctx.needs_input_grad[-3:-1]):
            dgate, dup = _weight_grads(both, inputs, ctx.sizes).chunk(2, dim=1)
        return dx, dweights, None, None, None, None, None, None, None, dgate, dup, ddown


def _products(x: Tensor, matrices: Tensor, sizes: list[int]) -> Tensor:
    """x (R, in), `sizes` rows of each expert, times matrices (E, in, out) -> (R, out)."""
    if _batched(x, sizes):
        return torch.bmm(x.view(len(sizes), -1, x.size(1)), matrices).flatten(0, 1)
    y = x.new_empty(len(x), matrices.size(2))
    for a, b, out in zip(x.split(sizes), matrices, y.split(sizes), strict=True):
        if _by_onednn(a):
            out.copy_(onednn.matmul_nt(a, b.t()))
        else:
            torch.mm(a, b, out=out)
    return y


def _weight_grads(grad: Tensor, x: Tensor, sizes: list[int]) -> Tensor:
    """`grad.T @ x` of each expert: (R, out), (R, in) -> (E, out, in)."""
    if _batched(x, sizes):
        grad, x = (t.view(len(sizes), -1, t.size(1)) for t in (grad, x))
        return torch.bmm(grad.mT, x)
    y = x.new_empty(len(sizes), grad.size(1), x.size(1))
    for a, b, out in zip(grad.split(sizes), x.split(sizes), y, strict=True):
        if _by_onednn(b):
            out.copy_(onednn.matmul_nt(a.t(), b.t()))
        else:
            torch.mm(a.t(), b, out=out)
    return y


def _batched(x: Tensor, sizes: list[int]) -> bool:
    return x.dtype == torch.bfloat16 and min(sizes) == max(sizes)


def _by_onednn(rows: Tensor) -> bool:
    return len(rows) >= _MIN_ROWS and onednn.usable(rows)
