"""The language-model loss from hidden states, without the (N, vocabulary) matrix of logits.

The rows are worked through in chunks: a chunk's logits are made, turned into their gradient in place and
multiplied back at once, so memory does not grow with N and the logits stay in cache. Products run in
hidden's dtype, everything between them in float32, and the weight's gradient is summed in float32.
Shapes: hidden (N, C), weight (V, C), targets (N,).
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
    """Return the float32 scalar `sum_i weights_i * -log p(targets_i)` with logits `hidden @ weight.T`.

    weights (N,) are constants; a row of weight 0 is skipped, so its target may be anything and a batch of
    only such rows gives a loss and gradients of exactly 0. softcap c replaces z by `c tanh(z / c)`.
    The gradients are computed in the forward, because the loss is a scalar and its upstream gradient only
    scales them. chunk is the number of rows at a time; the default suits the device's cache.
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
    """Return `log p(targets_i)` (N,) in float32, differentiable with a gradient per row."""
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
        w = weight.detach().to(hidden.dtype)
        rows = weights.nonzero()[:, 0]
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        dhidden = torch.zeros_like(hidden) if need_grad else None
        dweight = torch.zeros_like(weight, dtype=torch.float32) if need_grad else None
        for part in rows.split(chunk or _rows_per_chunk(weight)) if len(rows) else ():
            x, target, row_weight = hidden[part], targets[part], weights[part].float()
            logits, slope = _logits(x, w, softcap)
            picked, log_total = _target_and_log_total(logits, target)
            loss += torch.dot(row_weight, log_total - picked)
            if dhidden is None or dweight is None:
                continue
            d = _dlogits(logits, slope, log_total, target, row_weight).to(x.dtype)
            dhidden[part] = _matmul_nt(d, w.t())
            dweight += _matmul_nt(d.t(), x.t())
        ctx.save_for_backward(dhidden, dweight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # In place, because dweight may be the largest tensor of the step; a second backward is refused by
        # autograd, which sees that a saved tensor has changed.
        dhidden, dweight = ctx.saved_tensors
        return dhidden.mul_(grad), dweight.mul_(grad), None, None, None, None, None


class _TokenLogprobs(Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, chunk: int | None
    ) -> Tensor:
        ctx.softcap, ctx.chunk = softcap, chunk or _rows_per_chunk(weight)
        w = weight.detach().to(hidden.dtype)
        picked, log_totals = [], []
        for x, target in zip(hidden.split(ctx.chunk), targets.split(ctx.chunk), strict=True):
            logits, _ = _logits(x, w, softcap)
            values = _target_and_log_total(logits, target)
            picked.append(values[0])
            log_totals.append(values[1])
        log_total = torch.cat(log_totals)
        ctx.save_for_backward(hidden, weight, targets, log_total)
        return torch.cat(picked) - log_total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, log_total = ctx.saved_tensors
        w = weight.detach().to(hidden.dtype)
        dhidden = torch.empty_like(hidden)
        dweight = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, hidden.shape[0], ctx.chunk):
            part = slice(start, start + ctx.chunk)
            x, target = hidden[part], targets[part]
            logits, slope = _logits(x, w, ctx.softcap)
            d = _dlogits(logits, slope, log_total[part], target, -grad[part]).to(x.dtype)
            dhidden[part] = _matmul_nt(d, w.t())
            dweight += _matmul_nt(d.t(), x.t())
        return dhidden, dweight, None, None, None


def _matmul_nt(a: Tensor, b: Tensor) -> Tensor:
    return onednn.matmul_nt(a, b) if onednn.usable(a, b) else a @ b.t()


def _rows_per_chunk(weight: Tensor) -> int:
    """4 MiB of float32 logits on a CPU (its cache); 1 GiB on an accelerator, where few large products win."""
    elements = 2**20 if weight.device.type == "cpu" else 2**28
    return max(64, elements // weight.shape[0])


def _logits(x: Tensor, weight: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Return the float32 logits (n, V) and, with a softcap, tanh(z / softcap): what the slope is made of."""
    z = _matmul_nt(x, weight).float()
    if softcap is None:
        return z, None
    t = z.mul_(1 / softcap).tanh_()
    return t * softcap, t


def _target_and_log_total(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return (n,) each: the target's logit and the logarithm of the sum of exp over the vocabulary."""
    return logits.gather(1, target[:, None])[:, 0], logits.logsumexp(1)


def _dlogits(z: Tensor, t: Tensor | None, log_total: Tensor, target: Tensor, grad: Tensor) -> Tensor:
    """Turn the logits z in place into `grad_i (p - onehot) (1 - t^2)`, the gradient of `-grad_i log p`."""
    z.sub_(log_total[:, None]).exp_().mul_(grad[:, None])
    z.scatter_add_(1, target[:, None], -grad[:, None])
    if t is not None:
        z.addcmul_(z, t.square_(), value=-1)
    return z
