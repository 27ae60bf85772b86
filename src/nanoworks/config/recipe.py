"""The schema of a recipe: one YAML file says everything about one stage of one run.

Sections hold what every stage shares. A choice among methods (the stage itself, the optimizer, a data
source, a task) is a `Method`: a name and that method's own options, declared in the method's file.
`nanoworks config RECIPE` prints a recipe resolved; docs/config-reference.md lists every key.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from nanoworks.config.base import Frozen, Method
from nanoworks.config.parallel import ParallelSection

Checkpointing = Literal["none", "selective", "full"]
"""How much of a layer is computed again in backward instead of kept."""


class WeightedMethod(Method):
    """A data source or a task with its share of the mixture."""

    weight: float | None = Field(
        default=None,
        gt=0,
        description="share of the text, relative to the others (default 1); tasks without a weight are shuffled "
        "together, each example once an epoch",
    )


class RunSection(Frozen):
    name: str = Field(default="run", min_length=1, description="the run lives in <root>/<name>")
    root: str = "runs"
    seed: int = Field(default=42, ge=0, description="seeds initial weights, data order and sampling")


class HardwareSection(Frozen):
    device: Literal["auto", "cuda", "xpu", "mps", "cpu"] = "auto"
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        default="auto",
        description="of the arithmetic; master weights stay float32. auto: bfloat16 where fast",
    )
    threads: int | None = Field(default=None, gt=0, description="CPU threads of tensor operations; null: all cores")
    compile: bool = Field(default=False, description="torch.compile the layers (slow first step)")
    activation_checkpointing: Checkpointing = Field(
        default="none",
        description="computed again in backward instead of kept: all of a layer (full, also written true: a third more "
        "compute), or all but products and attention (selective: nearly none)",
    )

    @field_validator("activation_checkpointing", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {True: "full", False: "none"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _together(self) -> HardwareSection:
        if self.compile and self.activation_checkpointing == "selective":
            raise ValueError("compiled layers keep little besides products anyway: use none or full with compile")
        return self


class DataSection(Frozen):
    sequence_length: int = Field(default=2048, gt=1, description="tokens in a row")
    train: list[WeightedMethod] = Field(default_factory=list, description="the training mixture")
    validation: list[WeightedMethod] = Field(default_factory=list, description="for val/bpb and val/loss")
    packing: Literal["best_fit", "stream", "padded"] = Field(
        default="best_fit", description="how documents fill rows; see docs/data.md"
    )
    overlong: Literal["truncate", "drop"] = Field(
        default="truncate", description="what becomes of a conversation longer than a row; both are counted"
    )
    document_mask: bool = Field(default=False, description="attention stays inside a document")
    buffer: int = Field(default=1000, gt=0, description="documents best_fit chooses from")
    tokenizer_threads: int = Field(default=2, gt=0)
    prefetch: int = Field(default=8, ge=0, description="batches prepared ahead in a background thread; 0: none")


class Length(NamedTuple):
    """How long to train: an amount of one of the units in `LENGTH_UNITS`."""

    amount: float
    unit: str


LENGTH_UNITS = ("steps", "tokens", "tokens_per_parameter", "flops", "epochs")


class TrainSection(Frozen):
    """How long, and in what portions."""

    length: str = Field(
        description="an amount and a unit: `1000 steps`, `2e9 tokens`, `20 tokens_per_parameter` (Chinchilla's "
        "ratio), `1e19 flops` or `1 epochs` (passes over a finite mixture)"
    )
    tokens_per_step: int = Field(default=524288, gt=0, description="global, over all ranks and micro-batches")
    micro_batch_size: int = Field(default=32, gt=0, description="rows a forward pass")
    grad_clip: float = Field(default=1.0, ge=0, description="largest global gradient norm; 0: no clipping")
    sample_every: int = Field(default=0, ge=0, description="steps between sampled completions; 0: none")
    sample_prompts: list[str] = Field(default_factory=list)
    sample_tokens: int = Field(default=32, gt=0)

    @field_validator("length")
    @classmethod
    def _readable(cls, value: str) -> str:
        parse_length(value)
        return value


def parse_length(text: str) -> Length:
    """`"20 tokens_per_parameter"` -> Length(20.0, "tokens_per_parameter"); ValueError says what is expected."""
    amount, _, unit = text.strip().partition(" ")
    unit = unit.strip()
    if unit in ("step", "token", "epoch", "flop"):
        unit += "s"
    try:
        value = float(amount.replace("_", "").replace(",", ""))
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)) or unit not in LENGTH_UNITS:
        raise ValueError(f"give a positive amount and one of the units {', '.join(LENGTH_UNITS)}, e.g. `1000 steps`")
    return Length(value, unit)


class MoeSection(Frozen):
    """How a mixture of experts is trained: the stages pretrain, midtrain and sft; docs/moe.md explains each key.

    A schedule goes in a straight line and depends on the step alone. Evaluation and serving use the model as it is
    configured: all of its experts, its number of them for a token, no capacity.
    """

    balance_coef: float | None = Field(
        default=None,
        ge=0,
        description="weight of the load-balancing loss; null: the model's router_aux_loss_coef, or 0 with "
        "bias_update_rate",
    )
    balance_coef_final: float | None = Field(
        default=None, ge=0, description="the same at the end of the run, in a straight line; null: no change"
    )
    balance_over: Literal["layer", "model"] = Field(
        default="layer",
        description="the load-balancing loss is the mean of the layers', or one over the choices of all together as in "
        "transformers, where what is too much in one layer hides what is too little in another",
    )
    z_loss_coef: float = Field(default=0.0, ge=0, description="weight of the router z-loss, e.g. 0.001")
    bias_update_rate: float = Field(
        default=0.0,
        ge=0,
        description="balance without a loss: after each step, how far the bias of each expert in the selection moves "
        "towards the even share, e.g. 0.001; 0: no biases",
    )
    capacity_factor: float | None = Field(
        default=None,
        gt=0,
        description="an expert takes at most so many times the even share of a micro-batch; null: all that come",
    )
    overflow: Literal["drop", "dropless"] = Field(
        default="drop",
        description="what is beyond the capacity skips the expert, or is computed all the same and only counted",
    )
    expert_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="share of experts closed at random in each pass of a layer"
    )
    active_experts_start: int | None = Field(
        default=None,
        gt=0,
        description="experts a token goes to at step 0; more than the model's number begins dense and ends sparse",
    )
    active_experts_steps: int = Field(default=0, ge=0, description="steps until it is the model's number")
    open_experts_start: int | None = Field(
        default=None, gt=0, description="experts that can be chosen at step 0; the others open one after another"
    )
    open_experts_steps: int = Field(default=0, ge=0, description="steps until all are open")
    router_lr_fraction: float = Field(
        default=1.0, ge=0, description="multiplies the learning rate of routers; 0 freezes them"
    )
    router_lr_fraction_final: float | None = Field(
        default=None, ge=0, description="the same at the end of the run, in a straight line; null: no change"
    )

    expert_lr_fraction: float = Field(default=1.0, gt=0, description="multiplies the learning rate of experts")
    expert_lr_fraction_final: float | None = Field(
        default=None, ge=0, description="the same at the end of the run, in a straight line; null: no change"
    )

    @model_validator(mode="after")
    def _together(self) -> MoeSection:
        for start, steps in (
            ("active_experts_start", "active_experts_steps"),
            ("open_experts_start", "open_experts_steps"),
        ):
            if (getattr(self, start) is None) != (getattr(self, steps) == 0):
                raise ValueError(f"{start} and {steps} go together: from how many, and over how many steps")
        if self.overflow == "dropless" and self.capacity_factor is None:
            raise ValueError("overflow: dropless counts what is beyond capacity_factor; give one, or leave both out")
        return self


class EvalSection(Frozen):
    every: int = Field(default=250, ge=0, description="steps between validations; 0: only at the end")
    tokens: int = Field(default=1_000_000, gt=0, description="validation tokens a measurement uses at most")
    tasks: list[Method] = Field(default_factory=list, description="scored when training ends")
    tasks_every: int = Field(default=0, ge=0, description="steps between task evaluations; 0: only at the end")
    max_examples: int | None = Field(default=None, gt=0, description="per task; null: all")
    max_tokens: int = Field(default=512, gt=0, description="longest answer to an example of a task")


class CheckpointSection(Frozen):
    every: int = Field(default=0, ge=0, description="steps between checkpoints; 0: only the last")
    keep_last: int = Field(default=2, gt=0)
    keep_best: bool = Field(default=True, description="also keep the checkpoint with the lowest val/loss")
    async_save: bool = Field(
        default=False,
        description="copy what is saved to host memory and write it in a thread while training goes on; "
        "checkpoint/stall_ms is logged",
    )


class Recipe(Frozen):
    stage: Method
    run: RunSection = RunSection()
    init_from: str | None = Field(default=None, description="run, checkpoint or model directory to start from")
    tokenizer: str | None = Field(default=None, description="tokenizer directory; default: that of init_from")
    model: dict[str, Any] | None = Field(default=None, description="model_type and its configuration")
    hardware: HardwareSection = HardwareSection()
    parallel: ParallelSection = ParallelSection()
    data: DataSection = DataSection()
    train: TrainSection
    optim: Method = Method(name="muon_adamw")
    schedule: Method = Method(name="trapezoid")
    moe: MoeSection = MoeSection()
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    trackers: list[Method] = Field(default_factory=lambda: [Method(name="console"), Method(name="jsonl")])

    @model_validator(mode="after")
    def _has_a_model(self) -> Recipe:
        if self.model is None and self.init_from is None:
            raise ValueError("give either model (to start from random weights) or init_from")
        if self.init_from is None and self.tokenizer is None:
            raise ValueError("a model that starts from random weights needs tokenizer: DIRECTORY")
        return self
