"""torch's own parallelism behind `Strategy`: DDP, FSDP2, HSDP, tensor and pipeline parallel, and these together.

What is applied, and in which order, is `prepare`; nothing of it is known to models, stages or the trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanoworks.common.errors import UserError
from nanoworks.config.parallel import ParallelSection
from nanoworks.config.recipe import Checkpointing
from nanoworks.models import Decoder, build_model
from nanoworks.nn.linear import set_compute_dtype
from nanoworks.parallel import shards
from nanoworks.parallel.clip import clip_gradients
from nanoworks.parallel.context import share_rows
from nanoworks.parallel.data_parallel import Replicas, layer_options, shard_parameters, sum_gradients
from nanoworks.parallel.expert import split_experts
from nanoworks.parallel.mesh import build_mesh, degrees
from nanoworks.parallel.strategy import L, O, Steppable, place
from nanoworks.parallel.support import refusal
from nanoworks.parallel.tensor_training import split_matrices

if TYPE_CHECKING:
    from nanoworks.parallel.pipeline import Pipeline  # torch's pipelining takes a second to import


class Native:
    """The ranks of a running process group (`rendezvous.start_group`)."""

    in_parts = True

    def __init__(
        self,
        section: ParallelSection,
        device: torch.device,
        compute_dtype: torch.dtype,
        *,
        compile: bool = False,
        activation_checkpointing: Checkpointing = "none",
    ) -> None:
        """Raises UserError when the section does not fit the world, or asks for things that do not go together."""
        self.section, self.device, self.compute_dtype = section, device, compute_dtype
        self.compile, self.activation_checkpointing = compile, activation_checkpointing
        found = degrees(section, dist.get_world_size())
        if reason := refusal(section, found, compile=compile, checkpointing=activation_checkpointing):
            raise UserError(f"parallel: {found}: {reason}")
        self.mesh = build_mesh(found, device)
        self._forward: Callable[..., Any] = self._plain
        self._partial: list[str] = []
        self._model: Decoder | None = None
        self._pipeline: Pipeline | None = None
        self._talk = dist.new_group(backend="gloo") if dist.get_backend() != "gloo" else None
        # The first rank may measure tasks for hours while the others wait for it; a collective of training may not.
        self._patient = dist.new_group(backend="gloo", timeout=timedelta(days=1))

    def prepare(self, model: Decoder) -> Decoder:
        d, section = self.mesh.degrees, self.section
        if d.pipeline > 1:
            from nanoworks.parallel.pipeline import Pipeline

            self._pipeline = Pipeline(
                model,
                self.mesh.groups("pipeline"),
                schedule=section.pipeline_schedule,
                device=self.device,
                sequence_length=model.config.max_position_embeddings,
            )
        if d.tensor > 1:
            self._partial = split_matrices(
                model,
                self.mesh["tensor"],
                sequence_parallel=section.sequence_parallel,
                loss_parallel=section.loss_parallel,
            )
        if d.expert > 1:
            split_experts(model, self.mesh.of_experts("expert"))
        if d.context > 1:
            share_rows(model, self.mesh.groups("context"), method=section.context_method, tensor=d.tensor)
        set_compute_dtype(model, None if self.compute_dtype == torch.float32 else self.compute_dtype)
        place(model, compile=self.compile, activation_checkpointing=self.activation_checkpointing)
        sharded = d.shard * d.context
        cut = max(d.tensor, d.pipeline, d.expert) > 1  # DDP's hooks do not know of it; FSDP2's copies of one shard do
        if sharded > 1 or (d.replicate > 1 and cut) or section.cpu_offload:
            data = ("replicate", "shard") if d.replicate > 1 else ("shard",)
            mesh = self.mesh[data if len(data) > 1 else data[0]]
            if self._pipeline is not None:
                self._pipeline.shard(mesh, layers=layer_options(section, self.compute_dtype, mesh))
            else:
                experts = self.mesh.of_experts("replicate", "shard") if d.expert > 1 else None
                shard_parameters(model, mesh, section, self.compute_dtype, self.device, experts=experts)
            self._forward = self._sharded
        model.to(self.device if not section.cpu_offload else "cpu")
        if sharded == 1 and d.replicate > 1 and not cut and not section.cpu_offload:
            self._forward = Replicas(model, self.mesh.groups("replicate"), self.device)
        self._model = model
        return model

    def adopt(self, optimizer: O) -> O:
        return optimizer

    def forward_backward(
        self, micro_batches: Sequence[Any], compute: Callable[[Decoder, Any], L], scale: float
    ) -> list[L]:
        if self._pipeline is not None:
            return self._pipeline.forward_backward(micro_batches, compute, scale * self.mesh.degrees.data)
        losses = []
        average = self.mesh.degrees.data * self.mesh.degrees.context  # what FSDP2 and DDP divide sums by
        for i, batch in enumerate(micro_batches):
            loss = self._forward(compute, batch.to(self.device), last=i + 1 == len(micro_batches))
            (loss.sum * (scale * average)).backward()
            losses.append(loss)
        if self._partial:
            assert self._model is not None
            sum_gradients([self._model.get_parameter(n) for n in self._partial], self.mesh.groups("tensor"))
        return losses

    def _plain(self, compute: Callable[[Decoder, Any], L], batch: Any, *, last: bool) -> L:
        assert self._model is not None
        return compute(self._model, batch)

    def _sharded(self, compute: Callable[[Decoder, Any], L], batch: Any, *, last: bool) -> L:
        model: Any = self._model
        model.set_requires_all_reduce(last)  # copies of shards are summed once a step
        model.set_is_last_backward(last)
        return compute(model, batch)

    def clip(self, model: nn.Module, max_norm: float) -> float:
        return clip_gradients(
            model.named_parameters(),
            max_norm,
            ranks=self.mesh.world_size // self.mesh.degrees.pipeline,
            total=self._total,
            elsewhere=self._pipeline.duplicates if self._pipeline else (),
        )

    def _total(self, value: Tensor) -> Tensor:
        value = value.to(self.device)
        dist.all_reduce(value)
        return value

    def step(self, optimizer: Steppable, lr_scale: float, step: int) -> None:
        optimizer.step(lr_scale, step)

    def sum(self, values: Sequence[float]) -> list[float]:
        # Context and tensor ranks have the same data; of a pipeline those with the last stage know what came of it.
        knows = self._pipeline is None or self._pipeline.rank == self._pipeline.last_rank
        total = torch.tensor(values if knows else [0.0] * len(values), dtype=torch.float64)
        dist.all_reduce(total, group=self._talk)
        d = self.mesh.degrees
        return (total / (d.context * d.tensor)).tolist()

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.mesh.world_size
        dist.all_gather_object(values, value, group=self._talk)
        return values

    def wholes(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        if self._pipeline is not None:
            yield from self._pipeline.wholes(tensors, shards.full)
            return
        for name, tensor in tensors.items():
            yield name, torch.empty_like(tensor) if tensor.is_meta else shards.full(tensor)

    @torch.no_grad()
    def replica(self, model: Decoder) -> Decoder:
        if isinstance(self._forward, Replicas):
            return model
        self.settle()
        with torch.device("meta"):
            whole = build_model(model.config)
        named = {name: p.detach() for name, p in model.named_parameters()}
        state = {name: tensor.to(self.device) for name, tensor in self.wholes(named)}
        whole.load_state_dict({n: t.clone() for n, t in state.items()}, strict=False, assign=True)
        whole.tie_weights()
        set_compute_dtype(whole, None if self.compute_dtype == torch.float32 else self.compute_dtype)
        return whole.requires_grad_(False).train(model.training)

    def evaluable(self, model: Decoder) -> Decoder:
        return self.replica(model) if self._pipeline else model

    def metrics(self) -> dict[str, float]:
        return self._pipeline.measured if self._pipeline else {}

    def settle(self) -> None:
        roots: list[nn.Module] = [*self._pipeline.parts] if self._pipeline else []
        for root in [self._model, *roots] if self._model is not None else []:
            modules: Iterable[Any] = root.modules()
            for module in modules:
                if hasattr(module, "reshard"):  # a unit of FSDP2
                    module.reshard()

    def barrier(self) -> None:
        dist.barrier(group=self._patient)

    def close(self) -> None:
        dist.destroy_process_group()
