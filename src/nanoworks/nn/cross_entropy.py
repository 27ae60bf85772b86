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
        chunks = _Chunks(hidden, weight, targets, softcap, need_grad)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for rows in weights.nonzero()[:, 0].split(chunk or default_chunk(weight.size(0), weight.device)):
            row_weights = weights[rows].float()
            loss -= torch.dot(row_weights, chunks.logprobs(rows, -row_weights if need_grad else None))
        if need_grad:
            ctx.save_for_backward(chunks.dhidden, chunks.dweight_t)
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
        ctx.softcap, ctx.chunk = softcap, chunk or default_chunk(weight.size(0), weight.device)
        ctx.save_for_backward(hidden, weight, targets)
        chunks = _Chunks(hidden, weight, targets, softcap, need_grad=False)
        rows = torch.arange(hidden.size(0), device=hidden.device).split(ctx.chunk)
        return torch.cat([chunks.logprobs(part, None) for part in rows])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        chunks = _Chunks(hidden, weight, targets, ctx.softcap, need_grad=True)
        for rows in torch.arange(grad.size(0), device=grad.device).split(ctx.chunk):
            chunks.logprobs(rows, grad[rows])
        return chunks.dhidden, chunks.dweight_t.t(), None, None, None


class _Chunks:
    """Log-probabilities of the targets, some rows at a time, and the gradients those rows add."""

    def __init__(self, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, need_grad: bool) -> None:
        self.hidden, self.weight, self.targets = hidden, weight.to(hidden.dtype), targets
        self.softcap = softcap
        if need_grad:
            self.dhidden = torch.zeros_like(hidden)
            # (C, V) rather than (V, C): the orientation in which its product is fastest.
            self.dweight_t = torch.zeros(weight.shape[::-1], dtype=torch.float32, device=weight.device)

    def logprobs(self, rows: Tensor, grad: Tensor | None) -> Tensor:
        """Return log p(target) (n,) of the given rows; with their upstream gradient (n,), add to dhidden, dweight.

        One method, so that the (n, V) buffers are freed before the next chunk asks for the same memory.
        """
        x, target = self.hidden[rows], self.targets[rows, None]
        z, s = self._logits(x)
        # log p = z - log(sum exp z), and the largest p is exp(max z) / sum exp z: it gives the sum without
        # another pass over exp, and unlike p(target) it cannot underflow.
        chosen, largest = z.gather(1, target)[:, 0], z.amax(1)
        p = torch.softmax(z, dim=1, out=z)
        logprob = chosen - largest + p.amax(1).log()
        if grad is None:
            return logprob
        # d: the gradient of -log p(target) by the uncapped logits; with a cap, a quarter of it.
        d = p.scatter_add_(1, target, p.new_full((1, 1), -1.0).expand_as(target))
        if s is not None:
            d = torch.ops.aten.sigmoid_backward(d, s, grad_input=d)
        # What is left of the factors goes onto the n x C sides of the products, not onto the n x V one.
        scale = -(grad if s is None else 4 * grad)[:, None]
        d = d.to(x.dtype)
        self.dhidden[rows] = (_matmul_nt(d, self.weight.t()) * scale).to(x.dtype)
        self.dweight_t += _matmul_nt((x * scale).to(x.dtype).t(), d.t())
        return logprob

    def _logits(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return float32 logits (n, V), up to a constant, and with a cap the sigmoid they are made of."""
        z = _matmul_nt(x, self.weight).float()
        if self.softcap is None:
            return z, None
        s = z.mul_(2 / self.softcap).sigmoid_()
        return s * (2 * self.softcap), s


def _matmul_nt(a: Tensor, b: Tensor) -> Tensor:
    return onednn.matmul_nt(a, b) if onednn.usable(a, b) else a @ b.t()


def default_chunk(vocab_size: int, device: torch.device) -> int:
    """Rows for 8 MiB of float32 logits on a CPU (they stay in cache) and 1 GiB elsewhere (few launches), but
    enough of them that adding up the weight's gradient, once a chunk, is cheap beside the products."""
    elements = 2**21 if device.type == "cpu" else 2**28
    return max(256, elements // vocab_size)
