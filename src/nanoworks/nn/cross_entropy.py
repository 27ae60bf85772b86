"""The language-model loss from hidden states, without the (N, vocabulary) matrix of logits.

The rows are worked through in chunks: a chunk's logits are made, turned into their gradient in place and
multiplied back at once, so memory does not grow with N and the logits stay in cache. Products run in
hidden's dtype, everything between them in float32, and the weight's gradient is summed in float32.
Shapes: N rows, C features, V vocabulary; n rows of a chunk.

A soft cap c replaces a logit u by `c tanh(u / c)`, which is `2c sigmoid(2u / c) - c`. Softmax does not see the
constant, so the cap is computed as `2c s` with `s = sigmoid(2u / c)`, and its slope is `4 s (1 - s)`: on a CPU
PyTorch's sigmoid is ten times faster than its tanh, and its softmax twice as fast as exp or logsumexp.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from nanoworks.nn import onednn


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Return the float32 scalar `sum_i weights_i * -log p(targets_i)`; logits are `hidden @ weight.T`.

    Args:
        hidden: (N, C) in the dtype of the products.
        weight: (V, C), cast to hidden's dtype; its gradient is not rounded to that dtype on the way.
        targets: (N,) ids; where the weight is 0 anything is allowed.
        weights: (N,) constants. Rows of weight 0 are skipped: if all are, loss and gradients are exactly 0.
        softcap: bounds the logits smoothly; None leaves them as they are.
        chunk: rows at a time; the default suits the device.

    The gradients are made in the forward: the loss is a scalar, so what comes from above only scales them.
    """
    need_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(hidden, weight, targets, weights, softcap, chunk, need_grad)


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Return `log p(targets_i)`, (N,) float32, differentiable with a gradient per row; see linear_cross_entropy."""
    return _TokenLogprobs.apply(hidden, weight, targets, softcap, chunk)


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor,
        softcap: float | None,
        chunk: int | None,
        need_grad: bool,
    ) -> Tensor:
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradients = _Gradients(hidden, weight) if need_grad else None
        w = weight.to(hidden.dtype)
        for rows in weights.nonzero()[:, 0].split(chunk or _default_chunk(weight)):
            x, target, row_weight = hidden[rows], targets[rows], weights[rows].float()
            z, s = _logits(x, w, softcap)
            p, logprob = _softmax(z, target)
            loss -= torch.dot(row_weight, logprob)
            if gradients is not None:
                gradients.add(rows, x, w, _dlogits(p, s, target), row_weight if s is None else 4 * row_weight)
        if gradients is not None:
            ctx.save_for_backward(gradients.hidden, gradients.weight_t)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # In place, because the weight's can be the largest tensor of a step. A second backward is refused by
        # autograd, which sees that a saved tensor was changed.
        dhidden, dweight_t = ctx.saved_tensors
        return dhidden.mul_(grad), dweight_t.mul_(grad).t(), None, None, None, None, None


class _TokenLogprobs(Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, chunk: int | None
    ) -> Tensor:
        ctx.softcap, ctx.chunk = softcap, chunk or _default_chunk(weight)
        ctx.save_for_backward(hidden, weight, targets)
        w = weight.to(hidden.dtype)
        logprobs = torch.empty(hidden.size(0), dtype=torch.float32, device=hidden.device)
        for rows in _chunks(hidden.size(0), ctx.chunk):
            z, _ = _logits(hidden[rows], w, softcap)
            _, logprobs[rows] = _softmax(z, targets[rows])
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        w = weight.to(hidden.dtype)
        gradients = _Gradients(hidden, weight)
        scale = grad.neg() if ctx.softcap is None else grad * -4
        for rows in _chunks(hidden.size(0), ctx.chunk):
            x, target = hidden[rows], targets[rows]
            z, s = _logits(x, w, ctx.softcap)
            p, _ = _softmax(z, target)
            gradients.add(rows, x, w, _dlogits(p, s, target), scale[rows])
        return gradients.hidden, gradients.weight_t.t(), None, None, None


class _Gradients:
    """The gradients of hidden (N, C) and of weight, filled chunk by chunk.

    The latter is kept transposed, (C, V), the orientation in which its product is fastest.
    """

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        self.hidden = torch.zeros_like(hidden)
        self.weight_t = torch.zeros(weight.shape[::-1], dtype=torch.float32, device=weight.device)

    def add(self, rows: Tensor | slice, x: Tensor, w: Tensor, d: Tensor, scale: Tensor) -> None:
        """Account for the gradient `scale_i d_i` (n, V) of the logits `x @ w.T` of some rows.

        The scale goes onto the n x C sides of the products instead of the n x V one.
        """
        d, scale = d.to(x.dtype), scale[:, None]
        self.hidden[rows] = (_matmul_nt(d, w.t()) * scale).to(x.dtype)
        self.weight_t += _matmul_nt((x * scale).to(x.dtype).t(), d.t())


def _matmul_nt(a: Tensor, b: Tensor) -> Tensor:
    return onednn.matmul_nt(a, b) if onednn.usable(a, b) else a @ b.t()


def _default_chunk(weight: Tensor) -> int:
    """Rows for 8 MiB of float32 logits on a CPU (they stay in cache) and 1 GiB elsewhere (few launches), but
    enough of them that adding up the weight's gradient, once a chunk, is cheap beside the products."""
    elements = 2**21 if weight.device.type == "cpu" else 2**28
    return max(256, elements // weight.size(0))


def _chunks(rows: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, rows, chunk)]


def _logits(x: Tensor, w: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Return float32 logits (n, V), up to a constant, and with a soft cap the sigmoid they are made of."""
    z = _matmul_nt(x, w).float()
    if softcap is None:
        return z, None
    s = z.mul_(2 / softcap).sigmoid_()
    return s * (2 * softcap), s


def _softmax(z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Turn z in place into p (n, V); return it and log p(target) (n,).

    log p = z - log(sum exp z), and the largest p is exp(max z) / sum exp z: it gives the sum without another
    pass over exp, and unlike p(target) it cannot underflow.
    """
    chosen, largest = z.gather(1, target[:, None])[:, 0], z.amax(1)
    p = torch.softmax(z, dim=1, out=z)
    return p, chosen - largest + p.amax(1).log()


def _dlogits(p: Tensor, s: Tensor | None, target: Tensor) -> Tensor:
    """Turn p in place into the gradient of -log p(target) by the uncapped logits, with a cap a quarter of it."""
    p.scatter_add_(1, target[:, None], p.new_full((1, 1), -1.0).expand(p.size(0), 1))
    return p if s is None else torch.ops.aten.sigmoid_backward(p, s, grad_input=p)
