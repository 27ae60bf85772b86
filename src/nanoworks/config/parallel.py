"""The `parallel` section of a recipe: how a model and its data are spread over the ranks that torchrun starts."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from nanoworks.config.base import Frozen


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
    deepspeed: dict[str, Any] = Field(
        default_factory=dict, description="merged over the configuration that is made for DeepSpeed"
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
        if self.deepspeed and self.strategy == "native":
            raise ValueError("deepspeed: {...} needs strategy: deepspeed")
        return self
