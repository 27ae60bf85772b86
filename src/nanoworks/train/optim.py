"""Optimizers: which rule and which learning rate each role of parameter gets.

A model sorts its parameters by role (`Decoder.param_groups`): "matrix" (inside the layers), "embedding",
"unembedding" (the head), "other" (vectors: norms and biases). A family may split a role into parts, such as
"embedding.value"; an optimizer that has no rule for the part takes the one for the whole. `OPTIMIZERS` lists the
ways of training them.
The state is a flat mapping of tensors keyed by parameter name, so it fits a safetensors file and does not
depend on the order of parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import Parameter

from nanoworks.common.errors import UserError
from nanoworks.common.registry import Registry
from nanoworks.config.base import Frozen
from nanoworks.parallel.shards import as_part_of, assign, local
from nanoworks.train.muon import Muon
from nanoworks.train.schedule import rise

ParamGroups = Mapping[str, Sequence[tuple[str, Parameter]]]

OPTIMIZERS: Registry[type[Optimizer]] = Registry(
    "optimizer",
    {
        **dict.fromkeys(("adamw", "muon_adamw"), "nanoworks.train.optim"),
        "muon_adamw_2026": "nanoworks.train.muon_2026",
    },
)


class Optimizer(ABC):
    """What the Trainer drives. `lrs` is the learning rate of each role before the schedule; `total_steps` is the
    length of the run, which the Trainer sets for rules that change on the way."""

    matrix_state_bytes: ClassVar[int]
    """What it keeps for each parameter of a matrix inside the layers; for others AdamW's 8."""
    whole_matrices: ClassVar[bool] = False
    """Whether it refuses matrices of which ranks hold parts."""

    class Options(Frozen):
        lr_fraction: float = Field(
            default=1.0, gt=0, description="multiplies every rate; below 1 where a stage starts from a trained model"
        )

    lrs: dict[str, float]
    total_steps: int | None = None
    elementwise: torch.optim.Optimizer | None = None
    """The optimizer of torch that does all of it, where each element's update depends on no other: an engine may let it
    step flat pieces of parameters. Its groups have a `role`."""

    @abstractmethod
    def __init__(self, groups: ParamGroups, options: Any) -> None: ...

    @abstractmethod
    def step(self, lr_scale: float, step: int) -> None:
        """Take step number `step` (from 0) with every learning rate multiplied by `lr_scale`."""

    @abstractmethod
    def zero_grad(self) -> None:
        """Drop the gradients."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Return the state by `<parameter name>.<what>`: the tensors themselves, spread as the parameters are."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy in what `state_dict` returned, each tensor whole; raises UserError if it is of other parameters."""


def whole(role: str) -> str:
    """The role that `role` is a part of: "embedding.value" is of "embedding"."""
    return role.partition(".")[0]


@OPTIMIZERS.register("adamw")
class AdamW(Optimizer):
    """AdamW for everything (https://arxiv.org/abs/1711.05101); only matrices inside the layers decay."""

    matrix_state_bytes = 8

    class Options(Optimizer.Options):
        lr: float = Field(default=3e-4, gt=0, description="learning rate of everything")
        betas: tuple[float, float] = (0.9, 0.95)
        eps: float = Field(default=1e-8, gt=0)
        weight_decay: float = Field(default=0.1, ge=0, description="of the matrices inside the layers")

    def __init__(self, groups: ParamGroups, options: Options) -> None:
        self._start(
            groups,
            lrs=dict.fromkeys(groups, options.lr * options.lr_fraction),
            decays={role: options.weight_decay for role in groups if whole(role) == "matrix"},
            betas=dict.fromkeys(groups, options.betas),
            eps=options.eps,
        )
        self.elementwise = self._adamw

    def _start(
        self,
        groups: ParamGroups,
        *,
        lrs: dict[str, float],
        decays: Mapping[str, float],
        betas: Mapping[str, tuple[float, float]],
        eps: float,
    ) -> None:
        self.lrs = lrs
        # An elementwise rule works on this rank's part of a parameter alone; of a plain one that is the parameter.
        parts = {role: [(name, p, local(p)) for name, p in members] for role, members in groups.items()}
        self._named = [member for members in parts.values() for member in members]
        self._adamw = torch.optim.AdamW(
            [
                {
                    "params": [part for _, _, part in members],
                    "role": role,
                    "betas": betas[role],
                    "weight_decay": decays.get(role, 0.0),
                }
                for role, members in parts.items()
            ],
            eps=eps,
            fused=True,
        )
        for _, _, part in self._named:
            self._adamw.state[part] = {
                "step": torch.zeros((), dtype=torch.float32, device=part.device),
                "exp_avg": torch.zeros_like(part),
                "exp_avg_sq": torch.zeros_like(part),
            }

    def step(self, lr_scale: float, step: int) -> None:
        for group in self._adamw.param_groups:
            group["lr"] = self.lrs[group["role"]] * lr_scale
        for _, p, part in self._named:
            if part is not p:
                part.grad = None if p.grad is None else local(p.grad)
        self._adamw.step()

    def zero_grad(self) -> None:
        self._adamw.zero_grad()
        for _, p, _ in self._named:
            p.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": value if key == "step" else as_part_of(p, value)
            for name, p, part in self._named
            for key, value in self._adamw.state[part].items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        own = self.state_dict()
        wrong = sorted(own.keys() ^ state.keys())
        for key, value in own.items() if not wrong else ():
            saved = state[key]  # which may be read from a file here: one is held at a time
            if saved.shape != value.shape:
                wrong = [key]
                break
            assign(value, saved)
        if wrong:
            raise UserError(
                f"the saved optimizer state is not of this model and optimizer: {len(wrong)} tensors differ, "
                f"the first is {wrong[0]!r}; resume with the recipe the run was started with"
            )


@OPTIMIZERS.register("muon_adamw")
class MuonAdamW(AdamW):
    """Muon for the matrices inside the layers, AdamW for the rest, each role with its own rate (nanochat)."""

    matrix_state_bytes = 4

    class Options(Optimizer.Options):
        lr_matrix: float = Field(default=0.02, gt=0, description="Muon's rate")
        lr_embedding: float = Field(default=0.2, gt=0, description="AdamW's rate for the embedding")
        lr_unembedding: float = Field(default=0.004, gt=0, description="AdamW's rate for the head")
        lr_other: float = Field(default=0.004, gt=0, description="AdamW's rate for norms and biases")
        scale_lr_by_width: bool = Field(
            default=True, description="multiply AdamW's rates by (hidden_size / 768) ** -0.5; they were tuned at 768"
        )
        betas: tuple[float, float] = (0.8, 0.95)
        eps: float = Field(default=1e-10, gt=0)
        weight_decay: float = Field(default=0.0, ge=0, description="of the embedding and the head")
        momentum: float = Field(default=0.95, ge=0, lt=1, description="Muon's momentum after its warmup")
        momentum_start: float = Field(default=0.85, ge=0, lt=1, description="Muon's momentum at step 0")
        momentum_warmup_steps: int = Field(default=300, ge=0, description="steps from the one to the other")

    def __init__(self, groups: ParamGroups, options: Options) -> None:
        # A pipeline stage may have no embedding; the first matrix of a layer reads the hidden states as well.
        hidden_size = (groups["embedding"] or groups["matrix"])[0][1].shape[-1]
        scale = (hidden_size / 768) ** -0.5 if options.scale_lr_by_width else 1.0
        lrs = {
            "matrix": options.lr_matrix * options.lr_fraction,
            "embedding": options.lr_embedding * options.lr_fraction * scale,
            "unembedding": options.lr_unembedding * options.lr_fraction * scale,
            "other": options.lr_other * options.lr_fraction * scale,
        }
        self._options = options
        self._start(
            {role: members for role, members in groups.items() if whole(role) != "matrix"},
            lrs={role: lrs[whole(role)] for role in groups},
            decays={role: options.weight_decay for role in groups if whole(role) in ("embedding", "unembedding")},
            betas=dict.fromkeys(groups, options.betas),
            eps=options.eps,
        )
        self._muons = {role: Muon(members) for role, members in groups.items() if whole(role) == "matrix"}

    def step(self, lr_scale: float, step: int) -> None:
        super().step(lr_scale, step)
        o = self._options
        momentum = rise(o.momentum_start, o.momentum, o.momentum_warmup_steps, step)
        for role, muon in self._muons.items():
            muon.step(self.lrs[role] * lr_scale, momentum)

    def zero_grad(self) -> None:
        super().zero_grad()
        for muon in self._muons.values():
            muon.zero_grad()

    def state_dict(self) -> dict[str, Tensor]:
        momentum = {n: value for muon in self._muons.values() for n, value in muon.momentum().items()}
        return super().state_dict() | {f"{n}.momentum": value for n, value in momentum.items()}
