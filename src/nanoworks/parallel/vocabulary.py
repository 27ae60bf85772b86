"""Embedding and head of which each rank holds a share of the vocabulary: nobody ever has the logits of all ids.

The loss needs three numbers of all ranks for each token: the largest logit, the softmax's denominator and the
target's logit.
Shapes: N tokens, C features, V vocabulary, v = V / ranks ids of one rank, n tokens of a chunk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from nanoworks.common.errors import UserError
from nanoworks.models import Decoder
from nanoworks.nn.cross_entropy import default_chunk
from nanoworks.nn.head import Head
from nanoworks.parallel import collectives as C

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def split_vocabulary(model: Decoder, mesh: DeviceMesh) -> None:
    """Cut the embedding and the head of `model` in place, each rank keeping a range of ids.

    Raises:
        UserError: the vocabulary is not a multiple of the ranks, or the family has an embedding or head of its own.
    """
    from nanoworks.parallel.tensor_training import distributed

    size, n = model.config.vocab_size, mesh.size()
    if model.embed_tokens.weight.size(0) % n:
        raise UserError(
            f"parallel.loss_parallel: a vocabulary of {size} cannot be shared by {n} tensor ranks; leave it out, or "
            f"take a tokenizer of a multiple of {n}"
        )
    if type(model.head) is not Head or type(model.embed_tokens) is not nn.Embedding:
        raise UserError(f"parallel.loss_parallel does not know the head of a {model.config.model_type}; leave it out")
    tied = model.head.lm_head.weight is model.embed_tokens.weight
    model.embed_tokens.weight = distributed(model.embed_tokens.weight, mesh, 0)
    model.head.lm_head.weight = model.embed_tokens.weight if tied else distributed(model.head.lm_head.weight, mesh, 0)
    for module, part in ((model.embed_tokens, _EmbeddingPart), (model.head, _HeadPart)):
        module.__class__ = part
        module.group = mesh.get_group()  # type: ignore[assignment]


class _EmbeddingPart(nn.Embedding):
    group: Any

    def forward(self, tokens: Tensor) -> Tensor:
        weight = self.weight.to_local()  # type: ignore[attr-defined]
        ids = tokens - dist.get_rank(self.group) * weight.size(0)
        ours = (ids >= 0) & (ids < weight.size(0))
        found = F.embedding(ids.where(ours, 0), weight)
        return C.sum_out(found * ours[..., None], self.group)


class _HeadPart(Head):
    group: Any

    def forward(self, hidden: Tensor) -> Tensor:
        x, weight = self._operands(hidden)
        logits = C.gather_in(C.copy_in(x, self.group) @ weight.t().to(x.dtype), self.group, 1, partial=False).float()
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits.view(*hidden.shape[:-1], -1)

    def loss(self, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        rows = weights.reshape(-1).nonzero()[:, 0]
        x, weight = self._operands(hidden)
        logprobs = _TokenLogprobs.apply(x[rows], weight, targets.reshape(-1)[rows], self.softcap, self.group)
        return -torch.dot(weights.reshape(-1)[rows].float(), logprobs)

    def logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        x, weight = self._operands(hidden)
        return _TokenLogprobs.apply(x, weight, targets.reshape(-1), self.softcap, self.group).view_as(targets)

    def _operands(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = super()._operands(hidden)
        return x, weight.to_local()  # type: ignore[attr-defined]


class _TokenLogprobs(Function):
    """log p of each target, (N,) float32; logits are made again in the backward rather than kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, group: Any) -> Tensor:
        first = dist.get_rank(group) * weight.size(0)
        logprobs, normalisers = [], []
        for rows in _chunks(hidden, weight):
            z, _ = _logits(hidden[rows], weight, softcap)
            largest = z.amax(1)
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
            place, ours = _place(targets[rows], first, z.size(1))
            sums = torch.stack([(z - largest[:, None]).exp().sum(1), z.gather(1, place[:, None])[:, 0] * ours])
            dist.all_reduce(sums, group=group)
            normaliser = largest + sums[0].log()
            logprobs.append(sums[1] - normaliser)
            normalisers.append(normaliser)
        none = hidden.new_zeros(0, dtype=torch.float32)
        ctx.save_for_backward(hidden, weight, targets, torch.cat([none, *normalisers]))
        ctx.softcap, ctx.group, ctx.first = softcap, group, first
        return torch.cat([none, *logprobs])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normalisers = ctx.saved_tensors
        dhidden = torch.zeros_like(hidden)
        dweight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for rows in _chunks(hidden, weight):
            x = hidden[rows]
            z, slope = _logits(x, weight, ctx.softcap)
            d = (z - normalisers[rows][:, None]).exp_().neg_()
            place, ours = _place(targets[rows], ctx.first, z.size(1))
            d.scatter_add_(1, place[:, None], ours.float()[:, None])
            d *= grad[rows][:, None]
            if slope is not None:
                d *= slope
            d = d.to(x.dtype)
            dhidden[rows] = d @ weight.to(x.dtype)
            dweight += (d.t() @ x).float()
        return C.all_reduced(dhidden, ctx.group), dweight.to(weight.dtype), None, None, None


def _chunks(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    rows = torch.arange(hidden.size(0), device=hidden.device)
    return rows.split(default_chunk(weight.size(0), weight.device)) if len(rows) else ()


def _logits(x: Tensor, weight: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """(n, v) float32 logits and, with a cap, their slope by the uncapped ones."""
    z = (x @ weight.to(x.dtype).t()).float()
    if softcap is None:
        return z, None
    bounded = torch.tanh(z / softcap)
    return softcap * bounded, 1 - bounded.square()


def _place(targets: Tensor, first: int, size: int) -> tuple[Tensor, Tensor]:
    """Where in this rank's range each target is (0 if elsewhere), and whether it is there."""
    place = targets - first
    ours = (place >= 0) & (place < size)
    return place.where(ours, 0), ours
