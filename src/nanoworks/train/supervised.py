"""Pretraining, midtraining and supervised fine-tuning: next-token prediction over a mixture of documents.

The three differ in which tokens carry loss (all of them, or only what the assistant says) and in what their
recipes mix; the code is one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from nanoworks.common.errors import UserError
from nanoworks.config import Frozen
from nanoworks.config.recipe import parse_length
from nanoworks.data import Batch, Loader
from nanoworks.evals import bits_per_byte
from nanoworks.models import Decoder
from nanoworks.nn.context import DenseContext
from nanoworks.train.experts import expert_training
from nanoworks.train.optim import Optimizer
from nanoworks.train.resolve import build_mixture
from nanoworks.train.run import RunDirectory
from nanoworks.train.stage import STAGES, Loss, Stage, StageContext


class Supervised(Stage):
    class Options(Frozen):
        loss_on: Literal["all", "assistant"] = Field(
            default="all", description="tokens that carry loss: all, or only what the assistant says"
        )

    def __init__(self, context: StageContext, options: Any) -> None:
        super().__init__(context, options)
        recipe = context.recipe
        self.mixture = build_mixture(recipe.data.train, "train")
        self.validation = build_mixture(recipe.data.validation, "validation") if recipe.data.validation else None
        run = RunDirectory(recipe).path if context.strategy.mesh.is_main else None
        self.experts = expert_training(context.model, recipe.moe, run)
        self._micro_batches = micro_batches_per_step(context)
        self._loader: Loader | None = None

    def total_steps(self) -> int:
        recipe, model = self.context.recipe, self.context.model
        amount, unit = parse_length(recipe.train.length)
        per_step = recipe.train.tokens_per_step
        if unit == "steps":
            return max(1, round(amount))
        if unit == "epochs":
            with self._open(self.mixture, infinite=False) as loader:
                rows = sum(batch.tokens.size(0) for batch in loader)
            return max(1, math.ceil(amount * rows * recipe.data.sequence_length / per_step))
        if unit == "tokens":
            return max(1, round(amount) // per_step)
        if unit == "tokens_per_parameter":
            return max(1, int(amount * model.num_active_parameters()) // per_step)
        return max(1, round(amount / (model.flops_per_token(recipe.data.sequence_length) * per_step)))

    def batches(self, state: dict[str, Any] | None) -> Iterator[list[Batch]]:
        self._loader = self._open(self.mixture, infinite=True, state=state)
        stream = iter(self._loader)
        while True:
            yield [next(stream) for _ in range(self._micro_batches)]

    def loss(self, model: Decoder, batch: Batch) -> Loss:
        ctx = DenseContext(batch.tokens, documents=batch.documents)
        loss = model.head.loss(model(batch.tokens, ctx), batch.targets, batch.weights)
        if self.experts is None:
            return Loss(loss)
        assert ctx.routing is not None
        # The trainer divides sums by the step's supervised tokens, and a mean times their number is a sum.
        mean, parts = self.experts.loss(ctx.routing, batch.weights)
        count = batch.num_supervised
        return Loss(loss + mean * count, {"train/loss": loss, **{name: part * count for name, part in parts.items()}})

    def before_step(self, step: int, total_steps: int, optimizer: Optimizer) -> None:
        if self.experts is not None:
            self.experts.begin(step, total_steps, optimizer.lrs)

    def after_step(self) -> None:
        if self.experts is not None:
            strategy = self.context.strategy
            self.experts.finish(strategy.sum if strategy.mesh.world_size > 1 else None)

    def step_metrics(self) -> dict[str, float]:
        return {} if self.experts is None else self.experts.metrics()

    def evaluate(self) -> dict[str, float]:
        if self.validation is None:
            return {}
        context = self.context
        with self._open(self.validation, infinite=False) as loader:
            measured = bits_per_byte(
                context.strategy.evaluable(context.model),
                loader,
                context.tokenizer.token_bytes(),
                device=context.device,
                max_tokens=context.recipe.eval.tokens,
            )
        return {"val/loss": measured["loss"], "val/bpb": measured["bpb"]}

    def close(self) -> None:
        if self._loader is not None:
            self._loader.close()

    def _open(self, mixture: Any, *, infinite: bool, state: dict[str, Any] | None = None) -> Loader:
        recipe, mesh = self.context.recipe, self.context.strategy.mesh
        data = recipe.data
        return Loader(
            mixture,
            self.context.tokenizer,
            sequence_length=data.sequence_length,
            batch_size=micro_batch_size(self.context),
            packing=data.packing,
            overlong=data.overlong,
            loss_on=self.options.loss_on,
            documents=data.document_mask,
            rank=mesh.data_rank if infinite else 0,  # a pass over finite data is every rank's: all get the same figure
            world_size=mesh.data_world_size if infinite else 1,
            seed=recipe.run.seed,
            infinite=infinite,
            buffer=data.buffer,
            threads=data.tokenizer_threads,
            prefetch=data.prefetch,
            state=state,
        )


def micro_batches_per_step(context: StageContext) -> int:
    """Forward passes a step; `tokens_per_step` must be a whole number of them.

    Raises:
        UserError: the rows of a step, or the tokens of a row, cannot be shared evenly, or the schedule of a pipeline
            cannot run so many passes.
    """
    recipe, mesh = context.recipe, context.strategy.mesh
    rows = micro_batch_size(context) * recipe.data.sequence_length * mesh.data_world_size
    count = max(1, recipe.train.tokens_per_step // rows)
    if mesh.degrees.pipeline > 1:
        from nanoworks.parallel.pipeline_schedule import check_micro_batches  # a second to import

        check_micro_batches(recipe.parallel.pipeline_schedule, mesh.degrees.pipeline, count)
    if mesh.degrees.context > 1:
        from nanoworks.parallel.context import check_rows

        check_rows(recipe.data.sequence_length, mesh.degrees.context, recipe.parallel.context_method)
    return count


def micro_batch_size(context: StageContext) -> int:
    """Rows of a forward pass of this rank: the recipe's number, or less where ranks would otherwise take more tokens a
    step than the recipe says.

    Raises:
        UserError: the rows of a step cannot be shared evenly.
    """
    train, ranks = context.recipe.train, context.strategy.mesh.data_world_size
    if ranks == 1:
        return train.micro_batch_size
    length = context.recipe.data.sequence_length
    rows, rest = divmod(train.tokens_per_step // length, ranks)
    if rest or not rows:
        raise UserError(
            f"train.tokens_per_step={train.tokens_per_step} is {train.tokens_per_step // length} rows of {length} "
            f"tokens, which {ranks} data ranks cannot share evenly; set train.tokens_per_step="
            f"{max(rows, 1) * ranks * length}, or other degrees in parallel"
        )
    return max(n for n in range(1, min(train.micro_batch_size, rows) + 1) if rows % n == 0)


@STAGES.register("pretrain")
class Pretrain(Supervised):
    """Raw text; every token carries loss."""


@STAGES.register("midtrain")
class Midtrain(Supervised):
    """Conversations and tasks in quantity; every token carries loss, as in nanochat."""


@STAGES.register("sft")
class SFT(Supervised):
    """Conversations to imitate; only what the assistant says carries loss."""

    class Options(Supervised.Options):
        loss_on: Literal["all", "assistant"] = "assistant"
