"""One stage of a pipeline: some layers of a model, run by the same `compute` as the whole model would be.

Shapes: B rows, T tokens a row, C features of a micro-batch.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.pipelining import PipelineStage

from nanoworks.models import Decoder
from nanoworks.nn.context import ForwardContext
from nanoworks.parallel.pipeline_routing import Routers

Compute = Callable[[Decoder, Any], Any]
"""(model, micro-batch) -> a loss: a dataclass with a scalar `sum` and a mapping of scalars `metrics`."""


class Elsewhere(nn.Module):
    """Stands where a part of the model is that another rank holds."""

    def forward(self, *_: Any) -> Tensor:
        raise RuntimeError("this part of the model is on another pipeline rank; call Pipeline, not the model")

    loss = logprobs = forward  # of a head


class _HandOver(Exception):
    """Ends `compute` on a stage that is not the last."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.tensors = tensors


class _Settled(Function):
    """A loss whose gradients by `outputs` are known already; to run it backward twice is no harm."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *outputs_and_grads: Tensor) -> Tensor:
        ctx.save_for_backward(*outputs_and_grads[len(outputs_and_grads) // 2 :])
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.saved_tensors
        return None, *[g * grad for g in grads], *[None] * len(grads)


class Part(nn.Module):
    """One stage: some layers of a model, and what `compute` is given in its place."""

    def __init__(
        self,
        model: Decoder,
        index: int,
        bounds: Sequence[range],
        *,
        routers: Routers,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        first, last = index == 0, index == len(bounds) - 1
        self.index, self.layers, self.first, self.last = index, bounds[index], first, last
        self.routers, self.dtype, self.device = routers, dtype, device
        share = copy.copy(model)
        share._modules = dict(model._modules)
        share.layers = nn.ModuleList(model.layers[i] for i in self.layers)
        if not first and not (last and model.config.tie_word_embeddings):
            del share._modules["embed_tokens"]
        if not last:
            share.head = Elsewhere()  # type: ignore[assignment]
        share.embed, share.forward = self._begin, self._run  # type: ignore[method-assign]
        self.share = share
        self.compute: Compute
        self.batches: Sequence[Any]
        self.scale: float
        self.losses: dict[int, Any] = {}
        self._received: tuple[Tensor, ...] = ()
        self._ends: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] = ((), ())

    def forward(self, *received: Tensor, index: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Pass micro-batch number `index` on: to the next stage what it needs, from the last its scaled loss, (1,)."""
        i = int(index)
        self._received = received
        try:
            loss = self.compute(self.share, self.batches[i].to(self.device))
        except _HandOver as done:
            return done.tensors
        finally:
            self._received = ()
        metrics = {name: value.detach() for name, value in loss.metrics.items()}
        self.losses[i] = dataclasses.replace(loss, sum=loss.sum.detach(), metrics=metrics)
        return self._settle((loss.sum * self.scale).float().reshape(1))

    def _settle(self, loss: Tensor) -> Tensor:
        """Run the loss backward as far as the end of the layers, now.

        The head's loss makes its gradients in forward, which are as large as the head, and gives them once
        (`nn.cross_entropy`). So they must not wait for each micro-batch in flight, nor be asked for twice, by a
        schedule that computes the gradients of weights apart.
        """
        (ends, leaves), self._ends = self._ends, ((), ())
        if not torch.is_grad_enabled():
            return loss
        loss.backward()
        grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        settled: Tensor = _Settled.apply(loss.detach(), *ends, *grads)
        return settled

    def _begin(self, tokens: Tensor, ctx: ForwardContext) -> Tensor:
        if self.first:
            return type(self.share).embed(self.share, tokens, ctx)
        hidden, *routing = self._received
        if routing:
            self.routers.unpack(routing[0], tokens.numel(), ctx)
        return hidden

    def _run(self, tokens: Tensor, ctx: ForwardContext) -> Tensor:
        hidden = Decoder.forward(self.share, tokens, ctx)
        ends = (hidden if self.last else hidden.to(self.dtype), *self.routers.pack(ctx))
        if not self.last:
            raise _HandOver(ends)
        leaves = tuple(end.detach().requires_grad_(end.requires_grad) for end in ends)
        self._ends = (ends, leaves)
        if len(leaves) > 1:
            self.routers.unpack(leaves[1], tokens.numel(), ctx)
        return leaves[0]


class Stage(PipelineStage):
    """A stage that knows how long it computed."""

    clock: Clock

    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        with self.clock:
            return super().forward_one_chunk(*args, **kwargs)

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        with self.clock:
            return super().backward_one_chunk(*args, **kwargs)

    def backward_weight_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        with self.clock:
            return super().backward_weight_one_chunk(*args, **kwargs)


class Clock:
    """Adds up the time between entering and leaving: the device's, without waiting for it in between."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self) -> None:
        self._begin = self._now()

    def __exit__(self, *_: object) -> None:
        self._spans.append((self._begin, self._now()))

    def seconds(self) -> float:
        if not self._cuda:
            return sum(end - begin for begin, end in self._spans)
        torch.cuda.synchronize()
        return float(sum(begin.elapsed_time(end) for begin, end in self._spans)) / 1e3
