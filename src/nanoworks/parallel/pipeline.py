"""Pipeline parallelism: each rank holds some layers of a model, and micro-batches flow through the ranks.

torch's schedules do the work (`torch.distributed.pipelining`); here a Decoder is cut into their stages from outside.
Every rank reads the same batches and calls the same `compute(model, batch)`. On a stage that is not the last, the
model given to it hands over its hidden states at the end of its layers and the call ends there; on the last one it
goes on to the loss. So a stage of training is written once, for the whole model.

Besides the hidden states, what routers of experts did in earlier layers goes along (`pipeline_routing.Routers`), so
that the last stage's `compute` finds all of `ctx.routing` and the router losses have their gradients.

Shapes: B rows, T tokens a row, C features of a micro-batch.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from nanoworks.common.errors import UserError
from nanoworks.models import Decoder, build_model
from nanoworks.parallel.pipeline_routing import Routers
from nanoworks.parallel.pipeline_schedule import SCHEDULES, check_micro_batches, rank_of, simulate, stages_per_rank
from nanoworks.parallel.pipeline_split import Costs, estimated_costs, split
from nanoworks.parallel.pipeline_stage import Clock, Compute, Elsewhere, Part, Stage
from nanoworks.parallel.pipeline_wholes import gather


class Pipeline:
    """This rank's stages of a model, and the steps that train them together with the other ranks of `group`.

    The model is cut in place: what other ranks hold becomes `Elsewhere`, names of parameters stay. It may be on the
    meta device still. Afterwards `parts` may be wrapped (`shard`), then `forward_backward` takes a step's
    micro-batches.

    Args:
        model: a whole Decoder, the same on every rank.
        group: the ranks of this pipeline, in the order of the stages.
        schedule: a name in `SCHEDULES`.
        per_rank: stages each rank has; None: the schedule's number.
        costs: of the model's parts, for an even cut; None: estimated for rows of `sequence_length` tokens.
        dtype: of the hidden states between stages.

    Raises:
        UserError: the family cannot be cut, there are more stages than layers, or the schedule is unknown.
    """

    def __init__(
        self,
        model: Decoder,
        group: dist.ProcessGroup,
        *,
        schedule: str = "1f1b",
        device: torch.device,
        sequence_length: int,
        per_rank: int | None = None,
        costs: Costs | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_family(model)
        self.model, self.group, self.device, self.name = model, group, device, schedule
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.per_rank = stages_per_rank(schedule, per_rank)
        self.stages = self.ranks * self.per_rank
        costs = costs or estimated_costs(model, sequence_length)
        self.bounds = split(costs, self.stages)
        """The layers of each stage."""
        self._costs, self._head_cost = costs.stages(self.bounds), costs.head
        self._width = model.config.hidden_size
        self._routers = Routers.of(model)
        self._tied = model.config.tie_word_embeddings
        self.owners = {name: self._owner(name) for name, _ in model.named_parameters()}
        """Which rank of the pipeline saves and counts each parameter of the whole model, in the model's order."""
        self.parts = [
            Part(model, i, self.bounds, routers=self._routers, device=device, dtype=dtype)
            for i in range(self.stages)
            if rank_of(schedule, i, self.ranks) == self.rank
        ]
        self._cut()
        self.duplicates = frozenset(n for n, _ in model.named_parameters() if self.owners[n] != self.rank)
        """Names of parameters here that another rank holds as well and counts: the tied embedding at the last stage."""
        self.measured: dict[str, float] = {}
        """Of the last step: `pipeline/bubble`, the share of all ranks' time they waited, and what was expected."""
        self._made: tuple[Any, Any] = (None, None)

    @property
    def last_rank(self) -> int:
        """The rank with the last stage."""
        return rank_of(self.name, self.stages - 1, self.ranks)

    def shard(self, mesh: Any, *, layers: Mapping[str, Any] | None = None, **options: Any) -> None:
        """Apply FSDP2 to this rank's stages, over `mesh`.

        `options` are `fully_shard`'s, `layers` more of them that are for layers only. Where a
        schedule computes the gradients of weights apart, layers stay gathered after forward whatever is asked: between
        the two halves of a backward pass FSDP2 would take the parameters away.

        Raises:
            UserError: a tied embedding is in two stages of one rank, which FSDP2 cannot shard.
        """
        if self._tied and len(self.parts) > 1 and self.parts[0].first and self.parts[-1].last:
            raise UserError(
                f"the schedule {self.name} puts the tied embedding in two stages of one rank, which FSDP cannot shard; "
                "take another pipeline_schedule (1f1b), or model.tie_word_embeddings=false"
            )
        of_layers = {**options, **(layers or {})}
        if SCHEDULES[self.name].splits_backward:
            of_layers["reshard_after_forward"] = False
        for part in self.parts:
            for layer in part.share.layers:
                fully_shard(layer, mesh=mesh, **of_layers)
            fully_shard(part, mesh=mesh, **options)

    def forward_backward(self, micro_batches: Sequence[Any], compute: Compute, scale: float) -> list[Any]:
        """Add the gradients of `scale * sum of all losses` to the parameters; return the losses, the same on each rank.

        Every rank of the pipeline gives the same micro-batches, all of one shape (B, T).

        Raises:
            UserError: the schedule cannot run so many micro-batches, or their shapes differ.
        """
        began = time.perf_counter()
        schedule, stages = self._schedule(micro_batches)
        for part in self.parts:
            part.compute, part.batches, part.scale = compute, micro_batches, scale
            part.losses.clear()
            part.train(self.model.training)
            part.share.activation_checkpointing = self.model.activation_checkpointing
        numbers = torch.arange(len(micro_batches))
        schedule.step(*([numbers] if self.parts[0].first else []), target=numbers, index=numbers)
        self._tidy()
        self._sum_tied()
        losses = self._from_last([loss for part in self.parts for _, loss in sorted(part.losses.items())])
        self._measure(time.perf_counter() - began, sum(stage.clock.seconds() for stage in stages), len(micro_batches))
        return losses

    def wholes(
        self, tensors: Mapping[str, Tensor], full: Callable[[Tensor], Tensor] = lambda tensor: tensor
    ) -> Iterator[tuple[str, Tensor]]:
        """The tensors of all ranks, one at a time on each, parameters in the model's order (`pipeline_wholes.gather`).

        `full` makes a tensor whole first, where it is sharded over ranks of other dimensions.
        """
        with torch.device("meta"):
            whole = build_model(self.model.config)
        order = [name for name, _ in whole.named_parameters()]
        return gather(tensors, self.group, self.device, full=full, order=order)

    def _schedule(self, micro_batches: Sequence[Any]) -> tuple[Any, list[Stage]]:
        """torch's schedule for these micro-batches; the last one made is kept."""
        shapes = {tuple(batch.tokens.shape) for batch in micro_batches}
        check_micro_batches(self.name, self.ranks, len(micro_batches))
        if len(shapes) > 1:
            raise UserError(
                f"the micro-batches of a step have the shapes {sorted(shapes)}; a pipeline needs one: rows of one "
                "length, and micro-batches of one size (data.packing best_fit or stream)"
            )
        key = (len(micro_batches), shapes, self._routers.choices(self.model))
        if self._made[0] != key:
            ((B, T),) = shapes
            stages = [self._stage(part, B, T) for part in self.parts]
            engine = SCHEDULES[self.name].engine
            single = self.per_rank == 1 and SCHEDULES[self.name].fixed
            made = engine(stages[0] if single else stages, len(micro_batches), loss_fn=_given, scale_grads=False)
            self._made = (key, (made, stages))
        schedule, stages = self._made[1]
        for stage in stages:
            stage.clock = Clock(self.device)
        return schedule, stages

    def _stage(self, part: Part, B: int, T: int) -> Stage:
        top_k = self._routers.choices(self.model)

        def edge(layer: int) -> tuple[Tensor, ...]:
            """What is handed over before `layer`; with shapes known, torch need not try a forward pass."""
            hidden = torch.empty(B, T, self._width, dtype=part.dtype, device="meta", requires_grad=True)
            return hidden, *self._routers.empty(layer, B * T, top_k)

        number = torch.empty(1, dtype=torch.int64, device="meta")
        loss = torch.empty(1, device="meta", requires_grad=True)
        return Stage(
            part,
            part.index,
            self.stages,
            self.device,
            input_args=(number,) if part.first else edge(part.layers.start),
            output_args=(loss,) if part.last else edge(part.layers.stop),
            group=self.group,
        )

    def _tidy(self) -> None:
        """Lay the gradients out as their parameters are, which schedules with a split backward do not, and which fused
        optimizers take for granted."""
        for part in self.parts:
            for p in part.parameters():
                if p.grad is not None and p.grad.stride() != p.stride():
                    p.grad = torch.empty_like(p).copy_(p.grad)

    def _sum_tied(self) -> None:
        """Give the tied embedding the sum of its gradients in the first and the last stage, on both ranks."""
        ends = (0, self.last_rank)
        if not self._tied or self.rank not in ends or ends[0] == ends[1]:
            return
        weight = self.model.embed_tokens.weight
        if not weight.requires_grad:
            return
        assert weight.grad is not None
        mine = weight.grad.to_local() if isinstance(weight.grad, DTensor) else weight.grad
        peer = ends[1] if self.rank == ends[0] else ends[0]
        mine, theirs = mine.contiguous(), torch.empty_like(mine, memory_format=torch.contiguous_format)
        swap = [
            dist.P2POp(dist.isend, mine, group=self.group, group_peer=peer),
            dist.P2POp(dist.irecv, theirs, group=self.group, group_peer=peer),
        ]
        for work in dist.batch_isend_irecv(swap):
            work.wait()
        # a + b and b + a are the same bits, so both copies of the weight stay equal
        own = weight.grad.to_local() if isinstance(weight.grad, DTensor) else weight.grad
        own += theirs

    def _from_last(self, losses: list[Any]) -> list[Any]:
        """The losses that the rank with the last stage has, on every rank."""
        if self.ranks == 1:
            return losses
        carried: list[Any] = [[dataclasses.replace(x, sum=x.sum.cpu(), metrics=_on_cpu(x.metrics)) for x in losses]]
        dist.broadcast_object_list(carried, group_src=self.last_rank, group=self.group, device=self.device)
        result: list[Any] = carried[0]
        return result

    def _measure(self, wall: float, busy: float, micro_batches: int) -> None:
        figures = torch.tensor([wall, busy], dtype=torch.float64, device=self.device)
        dist.all_reduce(figures, group=self.group)
        all_wall, all_busy = figures.tolist()
        expected = simulate(self.name, self.ranks, self._costs, micro_batches, head=self._head_cost)
        self.measured = {
            "pipeline/bubble": max(0.0, 1 - all_busy / all_wall),
            "pipeline/bubble_expected": expected.fraction,
        }

    def _owner(self, name: str) -> int:
        part, _, rest = name.partition(".")
        if part == "layers":
            layer = int(rest.partition(".")[0])
            stage = next(i for i, layers in enumerate(self.bounds) if layer in layers)
        else:
            stage = self.stages - 1 if part == "head" else 0
        return rank_of(self.name, stage, self.ranks)

    def _cut(self) -> None:
        """Take from the model what other ranks hold. Its counts of parameters and FLOPs stay those of the whole."""
        model = self.model
        totals = model.num_parameters(), model.num_active_parameters()
        with torch.device("meta"):
            whole = build_model(model.config)
        model.num_parameters = lambda: totals[0]  # type: ignore[method-assign]
        model.num_active_parameters = lambda: totals[1]  # type: ignore[method-assign]
        model.flops_per_token = whole.flops_per_token  # type: ignore[method-assign]
        mine = {i for part in self.parts for i in part.layers}
        for i in range(len(model.layers)):
            if i not in mine:
                model.layers[i] = Elsewhere()
        last = any(part.last for part in self.parts)
        if not any(part.first for part in self.parts) and not (last and self._tied):
            model.embed_tokens = Elsewhere()  # type: ignore[assignment]
        if not last:
            model.head = Elsewhere()  # type: ignore[assignment]


def check_family(model: Decoder) -> None:
    """UserError when layers of the family need more of each other than the hidden states."""
    if type(model).forward is not Decoder.forward:
        raise UserError(
            f"the layers of {model.config.model_type} need more than the hidden states of the layer before (its "
            "forward is its own), so it cannot be cut into pipeline stages; use "
            "parallel.pipeline=1, with shard or tensor"
        )


def _given(output: Tensor, _: Tensor) -> Tensor:
    return output.sum()  # the last stage gives its loss itself


def _on_cpu(metrics: Any) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in metrics.items()}
