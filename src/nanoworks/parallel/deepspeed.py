"""DeepSpeed's ZeRO (https://arxiv.org/abs/1910.02054) behind `Strategy`.

The engine holds what it spreads over the ranks in flat pieces: the optimizer's state (stage 1), gradients too (2),
parameters too (3). What leaves it is whole and by name, so a run's checkpoints are those of any other strategy.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from nanoworks.common.errors import UserError
from nanoworks.config.parallel import ParallelSection
from nanoworks.config.recipe import Checkpointing
from nanoworks.models import Decoder, build_model
from nanoworks.nn.linear import set_compute_dtype
from nanoworks.parallel.deepspeed_config import configuration
from nanoworks.parallel.deepspeed_pieces import Elsewhere, Pieces, size_of
from nanoworks.parallel.mesh import Degrees, Mesh
from nanoworks.parallel.strategy import L, O, Steppable, place


class DeepSpeed:
    """The ranks of a running process group (`rendezvous.start_group`), all of them data ranks."""

    in_parts = False

    def __init__(
        self,
        section: ParallelSection,
        device: torch.device,
        compute_dtype: torch.dtype,
        *,
        compile: bool = False,
        activation_checkpointing: Checkpointing = "none",
    ) -> None:
        """Raises UserError when DeepSpeed is not installed, or the section or the options are not for it."""
        if compile:
            raise UserError("layers with DeepSpeed's hooks are not compiled; set hardware.compile=false")
        configuration(section, compute_dtype, parameters=1, device=device)  # its faults first
        self._library = _load(device)
        self.utils = self._library.utils
        self.section, self.device, self.compute_dtype = section, device, compute_dtype
        self.activation_checkpointing = activation_checkpointing
        rank, world = dist.get_rank(), dist.get_world_size()
        self.mesh = Mesh(rank, world, rank, world, Degrees(shard=world))
        self.engine: Any = None
        self._model: Decoder | None = None
        self.parameters: dict[str, Parameter] = {}
        self._talk = dist.new_group(backend="gloo") if dist.get_backend() != "gloo" else None
        # The first rank may measure tasks for hours while the others wait for it; a collective of training may not.
        self._patient = dist.new_group(backend="gloo", timeout=timedelta(days=1))

    def prepare(self, model: Decoder) -> Decoder:
        if self.compute_dtype != torch.float32:
            set_compute_dtype(model, self.compute_dtype)
        place(model, compile=False, activation_checkpointing=self.activation_checkpointing)
        self._model = model
        return model

    def adopt(self, optimizer: O) -> O:
        model, rule = self._model, getattr(optimizer, "elementwise", None)
        assert model is not None
        if rule is None:
            raise UserError(
                f"ZeRO updates flat pieces of parameters, and {type(optimizer).__name__} needs whole matrices; set "
                "optim.name=adamw, or parallel.strategy=native"
            )
        self.parameters = dict(model.named_parameters())
        frozen = {name: p.detach().clone() for name, p in self.parameters.items() if not p.requires_grad}
        if frozen and self.section.zero_stage == 3:
            raise UserError(
                f"with zero_stage 3 the trainer cannot move {next(iter(frozen))}, which has no gradient; set "
                "parallel.zero_stage=2"
            )
        count = model.num_parameters()
        masters = {} if self.compute_dtype == torch.float32 else _copies(self.parameters)
        _remember_counts(model)
        rule.state.clear()  # of whole parameters; the engine steps pieces
        rule.param_groups[:] = [group for group in rule.param_groups if group["params"]]
        config = configuration(self.section, self.compute_dtype, parameters=count, device=self.device)
        step = _Step(model)
        if self.section.zero_stage == 3:  # cut each parameter as it is moved: the engine would move them all first
            self._library.zero.Init(module=step.to(self.compute_dtype), config_dict_or_path=config)
        self.engine, *_ = self._library.initialize(model=step, optimizer=rule, config=config)
        adopted = Pieces(self, rule, optimizer)
        for name, parameter in self.parameters.items():  # bfloat16 parameters have float32 masters: not rounded ones
            if name in frozen:
                parameter.data = frozen[name].to(self.device)
            elif name in masters:
                self.utils.safe_set_full_fp32_param(parameter, masters[name].to(self.device))
        return cast(O, adopted)

    @property
    def zero(self) -> Any:
        """DeepSpeed's own optimizer."""
        return self.engine.optimizer

    @property
    def pieces(self) -> list[Tensor]:
        """This rank's flat float32 pieces of the parameters."""
        zero = self.zero
        return (
            zero.fp32_partitioned_groups_flat if self.section.zero_stage == 3 else zero.single_partition_of_fp32_groups
        )

    def forward_backward(
        self, micro_batches: Sequence[Any], compute: Callable[[Decoder, Any], L], scale: float
    ) -> list[L]:
        calls = []
        for i, batch in enumerate(micro_batches):
            self.engine.set_gradient_accumulation_boundary(i + 1 == len(micro_batches))
            call = _Call(compute, batch.to(self.device))
            total = self.engine(call)
            # DeepSpeed averages over ranks.
            self.engine.backward(total * (scale * self.mesh.world_size), scale_wrt_gas=False)
            calls.append(call)
        return [call.result for call in calls]

    def clip(self, model: nn.Module, max_norm: float) -> float:
        """The norm now; DeepSpeed scales the gradients while it steps, by the same norm."""
        zero = self.zero
        if self.section.zero_stage == 3:
            norm = self._library.runtime.utils.combine_grad_norm_groups(zero._get_norm_groups())
        else:
            norm = zero.scaled_global_norm()
        zero.clip_grad = max_norm
        return float(norm)

    def step(self, optimizer: Steppable, lr_scale: float, step: int) -> None:
        optimizer.step(lr_scale, step)

    def sum(self, values: Sequence[float]) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self._talk)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.mesh.world_size
        dist.all_gather_object(values, value, group=self._talk)
        return values

    def wholes(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors.items():
            if tensor.is_meta:
                parameter = self.parameters.get(name)
                yield name, torch.empty_like(tensor if parameter is None else _shape(parameter))
            elif isinstance(tensor, Elsewhere):
                yield name, tensor.read()
            elif name in self.parameters:
                yield name, self.whole(self.parameters[name])
            else:
                yield name, tensor

    def whole(self, parameter: Parameter, key: str | None = None) -> Tensor:
        """A parameter in float32, or what the optimizer keeps of it. Every rank."""
        if not parameter.requires_grad:
            return parameter.detach()
        if key is not None:
            return self.utils.safe_get_full_optimizer_state(parameter, key).view(size_of(parameter))
        return self.utils.safe_get_full_fp32_param(parameter).view(size_of(parameter))

    @torch.no_grad()
    def replica(self, model: Decoder) -> Decoder:
        if self.section.zero_stage < 3:
            return model
        with torch.device("meta"):
            replica = build_model(model.config)
        state = {name: self.whole(p).clone() for name, p in self.parameters.items()}
        replica.load_state_dict(state, strict=False, assign=True)
        replica.tie_weights()
        set_compute_dtype(replica, None if self.compute_dtype == torch.float32 else self.compute_dtype)
        return replica.requires_grad_(False).train(model.training)

    def evaluable(self, model: Decoder) -> Decoder:
        return cast(Decoder, _Gathered(self.engine.module)) if self.section.zero_stage == 3 else model

    def metrics(self) -> dict[str, float]:
        return {}

    def settle(self) -> None:
        if self.section.zero_stage == 3:
            self.zero._partition_all_parameters()

    def barrier(self) -> None:
        dist.barrier(group=self._patient)

    def close(self) -> None:
        if self.engine is not None:
            self.engine.destroy()
            self.engine = None
        dist.destroy_process_group()


class _Call:
    """What one micro-batch computes. The engine hooks into the tensors that go in and out, so only a loss does."""

    def __init__(self, compute: Callable[[Decoder, Any], Any], batch: Any) -> None:
        self.compute, self.batch = compute, batch
        self.result: Any = None

    def run(self, model: Decoder) -> Tensor:
        self.result = self.compute(model, self.batch)
        return cast(Tensor, self.result.sum)


class _Gathered:
    """What is measured of a model without a backward, where stage 3 gathers a layer just before it runs."""

    def __init__(self, step: nn.Module) -> None:
        self.step, self.head = step, self

    def __call__(self, tokens: Tensor, ctx: Any) -> Tensor:
        return cast(Tensor, self.step(_Forward(lambda model: model(tokens, ctx))))

    def logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return cast(Tensor, self.step(_Forward(lambda model: model.head.logprobs(hidden, targets))))


@dataclass(frozen=True)
class _Forward:
    run: Callable[[Decoder], Tensor]


class _Step(nn.Module):
    """The engine's module is what a stage computes with the model: parameters that a method of the model's head uses
    are gathered too, as those of a module whose forward runs."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, call: _Call | _Forward) -> Tensor:
        return call.run(self.model)


def _shape(parameter: Parameter) -> Tensor:
    return torch.empty(size_of(parameter), device="meta")


def _copies(parameters: Mapping[str, Parameter]) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in parameters.items() if p.requires_grad}


def _remember_counts(model: Decoder) -> None:
    """Counts of parameters and FLOPs stay those of the whole model when stage 3 has cut it."""
    totals = model.num_parameters(), model.num_active_parameters()
    with torch.device("meta"):
        whole = build_model(model.config)
    model.num_parameters = lambda: totals[0]  # type: ignore[method-assign]
    model.num_active_parameters = lambda: totals[1]  # type: ignore[method-assign]
    model.flops_per_token = whole.flops_per_token  # type: ignore[method-assign]


def _load(device: torch.device) -> Any:
    """Import DeepSpeed for this device, joining the process group that is there."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # It calls collectives by names that torch is about to drop, each time with a warning.
    warnings.filterwarnings("ignore", r".torch\.distributed\.\w+. is deprecated", FutureWarning)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import deepspeed
    except ImportError as error:
        raise UserError(
            "parallel.strategy=deepspeed needs DeepSpeed: pip install 'nanoworks[deepspeed]', or use native"
        ) from error
    # Built at its first use, by a compiler that may hang; gloo does the same sums.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # A process that trains several stages starts a group for each; DeepSpeed would keep to the first.
    deepspeed.comm.comm.cdb = None
    deepspeed.utils.groups._release_process_group_references()
    return deepspeed
