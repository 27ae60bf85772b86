"""torch's own parallelism behind `Strategy`: DDP, FSDP2, HSDP, tensor parallel, and these together.

What is applied, and in which order, is `prepare`; nothing of it is known to models, stages or the trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanoworks.common.errors import UserError
from nanoworks.config.parallel import ParallelSection
from nanoworks.models import Decoder, build_model
from nanoworks.nn.linear import set_compute_dtype
from nanoworks.parallel import shards
from nanoworks.parallel.clip import clip_gradients
from nanoworks.parallel.data_parallel import Replicas, shard_parameters, sum_gradients
from nanoworks.parallel.mesh import Degrees, build_mesh, degrees
from nanoworks.parallel.strategy import L, Steppable, place
from nanoworks.parallel.tensor_training import split_matrices


class Native:
    """The ranks of a running process group (`start_group`)."""

    def __init__(
        self,
        section: ParallelSection,
        device: torch.device,
        compute_dtype: torch.dtype,
        *,
        compile: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        """Raises UserError when the section does not fit the world, or asks for things that do not go together."""
        self.section, self.device, self.compute_dtype = section, device, compute_dtype
        self.compile, self.activation_checkpointing = compile, activation_checkpointing
        found = degrees(section, dist.get_world_size())
        if reason := refusal(section, found):
            raise UserError(f"parallel: {found}: {reason}")
        self.mesh = build_mesh(found, device)
        self._forward: Callable[..., Any] = self._plain
        self._partial: list[str] = []
        self._model: Decoder | None = None
        self._talk = dist.new_group(backend="gloo") if dist.get_backend() != "gloo" else None
        # The first rank may measure tasks for hours while the others wait for it; a collective of training may not.
        self._patient = dist.new_group(backend="gloo", timeout=timedelta(days=1))

    def prepare(self, model: Decoder) -> Decoder:
        d, section = self.mesh.degrees, self.section
        if d.tensor > 1:
            self._partial = split_matrices(
                model,
                self.mesh["tensor"],
                sequence_parallel=section.sequence_parallel,
                loss_parallel=section.loss_parallel,
            )
        set_compute_dtype(model, None if self.compute_dtype == torch.float32 else self.compute_dtype)
        place(model, compile=self.compile, activation_checkpointing=self.activation_checkpointing)
        sharded = d.shard * d.context
        if sharded > 1 or (d.replicate > 1 and d.tensor > 1) or section.cpu_offload:
            data = ("replicate", "shard") if d.replicate > 1 else ("shard",)
            mesh = self.mesh[data if len(data) > 1 else data[0]]
            shard_parameters(model, mesh, section, self.compute_dtype, self.device)
            self._forward = self._sharded
        model.to(self.device if not section.cpu_offload else "cpu")
        if sharded == 1 and d.replicate > 1 and d.tensor == 1 and not section.cpu_offload:
            self._forward = Replicas(model, self.mesh.groups("replicate"), self.device)
        self._model = model
        return model

    def forward_backward(
        self, micro_batches: Sequence[Any], compute: Callable[[Decoder, Any], L], scale: float
    ) -> list[L]:
        losses = []
        for i, batch in enumerate(micro_batches):
            loss = self._forward(compute, batch.to(self.device), last=i + 1 == len(micro_batches))
            (loss.sum * (scale * self.mesh.degrees.data)).backward()  # data parallel ranks average
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
        return clip_gradients(model.parameters(), max_norm, ranks=self.mesh.world_size, total=self._total)

    def _total(self, value: Tensor) -> Tensor:
        value = value.to(self.device)
        dist.all_reduce(value)
        return value

    def step(self, optimizer: Steppable, lr_scale: float, step: int) -> None:
        optimizer.step(lr_scale, step)

    def sum(self, values: Sequence[float]) -> list[float]:
        # Context and tensor ranks have the same data: each rank gives its share of the value.
        share = self.mesh.degrees.data / self.mesh.world_size
        total = torch.tensor([v * share for v in values], dtype=torch.float64)
        dist.all_reduce(total, group=self._talk)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.mesh.world_size
        dist.all_gather_object(values, value, group=self._talk)
        return values

    def full(self, tensor: Tensor) -> Tensor:
        return shards.full(tensor)

    @torch.no_grad()
    def replica(self, model: Decoder) -> Decoder:
        if isinstance(self._forward, Replicas):
            return model
        self.settle()
        with torch.device("meta"):
            whole = build_model(model.config)
        state = {name: self.full(p.detach()).to(self.device) for name, p in model.named_parameters()}
        whole.load_state_dict({n: t.clone() for n, t in state.items()}, strict=False, assign=True)
        whole.tie_weights()
        set_compute_dtype(whole, None if self.compute_dtype == torch.float32 else self.compute_dtype)
        return whole.requires_grad_(False).train(model.training)

    def settle(self) -> None:
        if self._model is not None:
            modules: Iterable[Any] = self._model.modules()
            for module in modules:
                if hasattr(module, "reshard"):  # a unit of FSDP2
                    module.reshard()

    def barrier(self) -> None:
        dist.barrier(group=self._patient)

    def close(self) -> None:
        dist.destroy_process_group()


def start_group(device: torch.device, section: ParallelSection) -> None:
    """Join the process group that torchrun's environment describes, unless this process is in one."""
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        timeout=timedelta(minutes=section.timeout_minutes),
        device_id=device if device.type == "cuda" else None,
    )


def refusal(section: ParallelSection, found: Degrees) -> str | None:
    """Why these do not go together, or None: the table of docs/scaling.md is made from this."""
    if section.cpu_offload and found.shard == 1:
        return "cpu_offload is FSDP2's: it needs shard of 2 or more"
    for name in ("pipeline", "expert", "context"):
        if getattr(found, name) > 1:
            return f"{name} is not yet part of training by recipe; use shard, replicate or tensor"
    return None
