"""From a recipe to a finished run, in the order in which things can go wrong: options, device, model, memory,
data, and only then training. `nanoworks train` and the demo call `launch`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanoworks.checkpoint import check_vocabulary, load_checkpoint
from nanoworks.common.allocator import keep_freed_memory
from nanoworks.common.device import choose_device, choose_dtype, peak_memory_bytes, supports_compile
from nanoworks.common.errors import UserError
from nanoworks.config import Recipe
from nanoworks.models import Decoder, build_model
from nanoworks.nn.flops import peak_flops
from nanoworks.nn.linear import set_compute_dtype
from nanoworks.parallel import Strategy, log_failure, log_to_file, open_strategy, own_device, restarted
from nanoworks.parallel.placement import place_experts
from nanoworks.tokenizer import Tokenizer
from nanoworks.trackers import TrackedRun, open_trackers
from nanoworks.trackers.jsonl import truncate_after
from nanoworks.train.observe import Observer
from nanoworks.train.plan.automatic import chosen
from nanoworks.train.plan.fit import require_fit
from nanoworks.train.plan.outcome import lines, predicted_against_actual
from nanoworks.train.plan.planner import Forecast
from nanoworks.train.resolve import Plan, build_tasks, model_config, resolve
from nanoworks.train.run import RunDirectory
from nanoworks.train.stage import StageContext
from nanoworks.train.trainer import Trainer
from nanoworks.train.watch import open_watch

log = logging.getLogger("nanoworks")


_HOST = torch.device("cpu")
"""Where ranks build a model, each moving only its own part to its device."""


@dataclass(frozen=True)
class Outcome:
    run: Path
    finished: bool
    """False when a signal ended the run early; its state is saved."""
    is_main: bool = True
    """False on every rank but the first: one of them is enough to tell the user."""


def launch(recipe: Recipe, *, resume: bool = False) -> Outcome:
    """Train one stage.

    Raises:
        UserError: anything wrong with recipe, data, model, device or memory, before the first step.
        NonFinite: loss or gradient stopped being finite.
    """
    resolve(recipe)  # its faults first
    keep_freed_memory()
    device = own_device(choose_device(recipe.hardware.device))
    dtype = choose_dtype(recipe.hardware.dtype, device)
    if recipe.hardware.threads is not None:
        torch.set_num_threads(recipe.hardware.threads)
    if recipe.hardware.compile and not supports_compile(device):
        raise UserError("torch.compile does not work here (it needs a C++ compiler); set hardware.compile=false")
    plan = resolve(chosen(recipe, device))
    recipe = plan.recipe
    torch.manual_seed(recipe.run.seed)

    strategy = open_strategy(
        recipe.parallel,
        device,
        dtype,
        compile=recipe.hardware.compile,
        activation_checkpointing=recipe.hardware.activation_checkpointing,
    )
    try:
        return _train(plan, strategy, device, dtype, resume=resume or restarted())
    except Exception as error:
        log_failure(error)
        raise
    finally:
        strategy.close()


def _train(plan: Plan, strategy: Strategy, device: torch.device, dtype: torch.dtype, *, resume: bool) -> Outcome:
    recipe, mesh = plan.recipe, strategy.mesh
    run = RunDirectory(recipe)
    checkpoint = run.find(resume=resume)
    if run.finished:
        log.info("%s is finished already", run.path)
        return Outcome(run.path, True, mesh.is_main)
    strategy.barrier()  # all ranks have looked before the first one writes
    if mesh.world_size > 1:
        log_to_file(run.path / "logs", mesh.rank)
    parent, model, tokenizer = _starting_point(recipe, device if mesh.world_size == 1 else _HOST, checkpoint)
    if recipe.parallel.expert_placement is not None and checkpoint is None:  # what goes on has its numbers already
        place_experts(model, Path(recipe.parallel.expert_placement), mesh.degrees.expert)
    expected = _expect(recipe, model, strategy, device)

    model = strategy.prepare(model)
    set_compute_dtype(model, None if dtype == torch.float32 else dtype)
    stage = plan.stage(StageContext(recipe, model, tokenizer, device, strategy), plan.stage_options)
    optimizer = strategy.adopt(plan.optimizer(stage.param_groups(), plan.optimizer_options))
    tasks = build_tasks(recipe)
    total = stage.total_steps()

    if mesh.world_size > 1 and stage.trained is not model:
        raise UserError(f"the stage {recipe.stage.name} trains heads beside a model, on one device; leave torchrun out")
    if mesh.is_main:
        run.create(parent=parent)
    start = 0 if checkpoint is None else int(checkpoint.name.removeprefix("step-"))
    if mesh.is_main:
        for file in ("metrics.jsonl", "samples.jsonl"):  # what a killed run wrote past its last checkpoint
            truncate_after(run.path / file, start)
        run.update(model=_figures(model, tokenizer), total_steps=total, dtype=str(dtype).removeprefix("torch."))
        if mesh.world_size > 1:
            run.update(world_size=mesh.world_size, mesh=str(mesh.degrees))
    trackers = open_trackers(
        recipe.trackers if mesh.is_main else [],
        TrackedRun(
            directory=run.path,
            id=run.info.get("id", ""),
            name=recipe.run.name,
            stage=recipe.stage.name,
            total_steps=total,
            start_step=start,
            config=recipe.model_dump(mode="json"),
        ),
    )
    observer = Observer(
        recipe=recipe, model=model, tokenizer=tokenizer, stage=stage, run=run, tasks=tasks, strategy=strategy
    )
    watch = open_watch(strategy, list(model.layers), device, run.path / "logs", minutes=recipe.parallel.timeout_minutes)
    trainer = Trainer(
        recipe=recipe,
        model=model,
        tokenizer=tokenizer,
        stage=stage,
        optimizer=optimizer,
        schedule=plan.schedule,
        strategy=strategy,
        run=run,
        trackers=trackers,
        observer=observer,
        device=device,
        peak_flops=peak_flops(device, dtype),
        total_steps=total,
        watch=watch,
    )
    try:
        if checkpoint is not None:
            trainer.resume(checkpoint)
            log.info("resuming %s from step %d of %d", run.path, start, total)
        before = trainer.progress.seconds
        finished = trainer.fit()
    finally:
        watch.close()
        trackers.close()
    peaks = strategy.gather(peak_memory_bytes(device))
    if mesh.is_main:
        steps, seconds = trainer.progress.step - start, trainer.progress.seconds - before
        if expected is not None and steps > 0:
            compared = predicted_against_actual(expected, steps=steps, seconds=seconds, peak_bytes=peaks)
            log.info("as planned: %s", "; ".join(lines(compared)))
            run.update(plan=compared)
        run.update(status="finished" if finished else "stopped", seconds=trainer.progress.seconds)
    return Outcome(run.path, finished, mesh.is_main)


def _starting_point(
    recipe: Recipe, device: torch.device, checkpoint: Path | None
) -> tuple[str | None, Decoder, Tokenizer]:
    """The checkpoint that the run descends from, the model it begins or goes on with, and the tokenizer."""
    source = checkpoint or recipe.init_from
    if source is None:
        return None, *_fresh(recipe)
    loaded = load_checkpoint(source, device=device, dtype=torch.float32)
    tokenizer = Tokenizer.load(recipe.tokenizer) if recipe.tokenizer and checkpoint is None else loaded.tokenizer
    if tokenizer is None:
        raise UserError(f"{source} has no tokenizer; give one with tokenizer=DIRECTORY")
    check_vocabulary(loaded.config, tokenizer)
    return str(loaded.path), _adapted(loaded.model, recipe.model, str(source)), tokenizer


def _adapted(model: Decoder, changes: Mapping[str, Any] | None, source: str) -> Decoder:
    """`model` with the recipe's changes to its configuration: a longer context, another scaling, never other shapes."""
    if not changes or all(getattr(model.config, key, None) == value for key, value in changes.items()):
        return model
    if changes.get("model_type", model.config.model_type) != model.config.model_type:
        raise UserError(
            f"model.model_type is {changes['model_type']!r} but {source} holds a "
            f"{model.config.model_type!r}; leave it out when init_from is given"
        )
    config = model.config.changed(changes)
    with torch.device("meta"):
        adapted = build_model(config)
    wanted = {name: p.shape for name, p in adapted.named_parameters()}
    for name, parameter in model.named_parameters():
        if wanted.get(name) != parameter.shape:
            raise UserError(
                f"model: with these changes {name} would be {tuple(wanted.get(name, ()))}, but {source} has "
                f"{tuple(parameter.shape)}; with init_from only what leaves the weights' shapes can be changed"
            )
    adapted.load_state_dict(dict(model.named_parameters()), strict=False, assign=True)
    adapted.tie_weights()
    return adapted


def _fresh(recipe: Recipe) -> tuple[Decoder, Tokenizer]:
    """A model of random weights."""
    assert recipe.tokenizer is not None
    tokenizer = Tokenizer.load(recipe.tokenizer)
    config = model_config(recipe, vocab_size=tokenizer.vocab_size)
    check_vocabulary(config, tokenizer)
    model = build_model(config)
    model.init_weights()
    return model, tokenizer


def _expect(recipe: Recipe, model: Decoder, strategy: Strategy, device: torch.device) -> Forecast | None:
    """Refuse rows beyond the model's context and what does not fit a device's memory. Returns what the run should take,
    on the first rank; None on the others."""
    if recipe.data.sequence_length > model.config.max_position_embeddings:
        raise UserError(
            f"data.sequence_length {recipe.data.sequence_length} is longer than the model's context of "
            f"{model.config.max_position_embeddings}; set data.sequence_length={model.config.max_position_embeddings}"
        )
    expected, problem = None, None
    if strategy.mesh.is_main:
        try:
            expected = require_fit(recipe, strategy.mesh.degrees, device, model.config)
        except UserError as error:  # the others must hear of it
            problem = str(error)
    problem = strategy.gather(problem)[0]
    if problem is not None:
        raise UserError(problem)
    return expected


def _figures(model: Decoder, tokenizer: Tokenizer) -> dict[str, Any]:
    config = model.config
    return {
        "model_type": config.model_type,
        "parameters": model.num_parameters(),
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "vocab_size": config.vocab_size,
        "context": config.max_position_embeddings,
        "tokenizer": tokenizer.fingerprint[:12],
    }
