"""The `parallel` section of a recipe: how a model and its data are spread over the ranks that torchrun starts."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from nanoworks.config.base import Frozen

_ZERO = ("zero_stage", "offload", "deepspeed")
_NATIVE = (
    *("replicate", "shard", "context", "tensor", "pipeline", "expert", "expert_placement", "sequence_parallel"),
    *("loss_parallel", "reshard_after_forward", "gather_dtype", "reduce_dtype", "cpu_offload", "pipeline_schedule"),
    "context_method",
)


class ParallelSection(Frozen):
    """World = pipeline * replicate * shard * context * tensor. On one device nothing here matters; docs/scaling.md
    says when to choose what, and which choices go together."""

    strategy: Literal["native", "deepspeed", "auto"] = Field(
        default="native", description="native: torch's own (DDP, FSDP2, ...); auto: what `nanoworks plan` ranks first"
    )
    replicate: int = Field(default=1, gt=0, description="whole copies; with shard: 1 this is DDP, with more HSDP")
    shard: int = Field(
        default=-1, description="ranks over which parameters are sharded (FSDP2); -1: the rest of the world"
    )
    context: int = Field(default=1, gt=0, description="ranks that share the tokens of a row")
    tensor: int = Field(default=1, gt=0, description="ranks that share each matrix, by the family's plan")
    pipeline: int = Field(default=1, gt=0, description="stages of layers")
    expert: int = Field(default=1, gt=0, description="ranks that share the experts, taken out of the data ranks")
    expert_placement: str | None = Field(
        default=None,
        description="a run by whose use of experts they are numbered anew, so that expert ranks get about equal work",
    )
    sequence_parallel: bool = Field(
        default=False, description="with tensor: norms and residuals hold a share of the tokens each"
    )
    loss_parallel: bool = Field(default=False, description="with tensor: embedding and head share the vocabulary")
    reshard_after_forward: bool = Field(
        default=True, description="FSDP2 frees gathered layers after forward (ZeRO-3); false keeps them (ZeRO-2)"
    )
    gather_dtype: Literal["compute", "float32"] = Field(
        default="compute", description="in which FSDP2 gathers the layers: that of the arithmetic, or the masters'"
    )
    reduce_dtype: Literal["float32", "compute"] = Field(
        default="float32", description="in which FSDP2 sums the gradients of the layers"
    )
    cpu_offload: bool = Field(default=False, description="FSDP2 keeps parameters, gradients and optimizer on the host")
    pipeline_schedule: Literal["gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv"] = "1f1b"
    context_method: Literal["all_gather", "ulysses"] = Field(
        default="all_gather", description="context ranks exchange all keys and values, or heads for tokens"
    )
    timeout_minutes: float = Field(
        default=10, gt=0, description="how long a rank waits for another before the run is given up"
    )
    zero_stage: Literal[1, 2, 3] = Field(
        default=3,
        description="what DeepSpeed spreads over ranks: optimizer state (1), gradients too, parameters too (3)",
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        default="none", description="what DeepSpeed keeps on the host: the optimizer's state, parameters too (stage 3)"
    )
    deepspeed: dict[str, Any] | str = Field(
        default_factory=dict,
        description="DeepSpeed's own keys, or a JSON file of them, over those that are made from the recipe",
    )

    @field_validator("shard")
    @classmethod
    def _known(cls, value: int) -> int:
        if value < 1 and value != -1:
            raise ValueError("give a number of ranks, or -1 for the rest of the world")
        return value

    @model_validator(mode="after")
    def _together(self) -> ParallelSection:
        if self.tensor == 1 and (self.sequence_parallel or self.loss_parallel):
            raise ValueError("sequence_parallel and loss_parallel need tensor: 2 or more")
        if self.expert == 1 and self.expert_placement is not None:
            raise ValueError("expert_placement needs expert: 2 or more")
        zeros = self._changed(_ZERO)
        if self.strategy != "deepspeed" and zeros:
            raise ValueError(f"{', '.join(zeros)} needs strategy: deepspeed")
        if self.strategy == "deepspeed" and (native := self._changed(_NATIVE)):
            raise ValueError(
                f"{', '.join(native)}: not with strategy: deepspeed, whose ranks have rows of their own and pieces of "
                "the model; leave it out, or use strategy: native"
            )
        if self.offload == "all" and self.zero_stage < 3:
            raise ValueError("offload: all needs zero_stage: 3, whose parameters are in pieces; use offload: optimizer")
        return self

    def _changed(self, names: tuple[str, ...]) -> list[str]:
        """Those of `names` that are not as they come."""
        fields = type(self).model_fields
        return [n for n in names if getattr(self, n) != fields[n].get_default(call_default_factory=True)]
