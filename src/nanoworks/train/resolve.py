"""Checks every choice of a recipe against the registries before anything starts, and builds what is cheap.

A wrong task option at the end of a recipe must not be found after a night of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanoworks.common.errors import UserError, nearest
from nanoworks.config import ModelConfig, Recipe
from nanoworks.config.recipe import WeightedMethod
from nanoworks.data import SOURCES, ConversationSource, Mixture, Source
from nanoworks.models import config_from_dict
from nanoworks.tasks import TASKS, Task
from nanoworks.trackers import TRACKERS
from nanoworks.train.optim import OPTIMIZERS, Optimizer
from nanoworks.train.schedule import SCHEDULES, Schedule
from nanoworks.train.stage import STAGES, Stage


@dataclass(frozen=True)
class Plan:
    """A recipe whose every name is known and whose every option is valid."""

    recipe: Recipe
    stage: type[Stage]
    stage_options: Any
    optimizer: type[Optimizer]
    optimizer_options: Any
    schedule: Schedule


def resolve(recipe: Recipe) -> Plan:
    """Validate names and options; UserError names the key (`eval.tasks.0: unknown task ...`)."""
    stage_options = STAGES.parse(recipe.stage.name, recipe.stage.options, where="stage")
    optimizer_options = OPTIMIZERS.parse(recipe.optim.name, recipe.optim.options, where="optim")
    schedule_options = SCHEDULES.parse(recipe.schedule.name, recipe.schedule.options, where="schedule")
    for i, tracker in enumerate(recipe.trackers):
        TRACKERS.parse(tracker.name, tracker.options, where=f"trackers.{i}")
    for i, task in enumerate(recipe.eval.tasks):
        TASKS.parse(task.name, _task_options(task.options), where=f"eval.tasks.{i}")
    if recipe.model is not None and recipe.init_from is None:  # else it holds changes to the parent's
        model_config(recipe, vocab_size=2**20)  # the tokenizer, not read yet, has the true size
    for part in ("train", "validation"):
        for i, method in enumerate(getattr(recipe.data, part)):
            _parse_data(method, part, f"data.{part}.{i}")
    return Plan(
        recipe,
        STAGES.get(recipe.stage.name),
        stage_options,
        OPTIMIZERS.get(recipe.optim.name),
        optimizer_options,
        SCHEDULES.get(recipe.schedule.name)(schedule_options),
    )


def model_config(recipe: Recipe, *, vocab_size: int) -> ModelConfig:
    """The configuration of a new model; vocabulary and context follow tokenizer and rows unless the recipe says so."""
    assert recipe.model is not None
    follow = {"vocab_size": vocab_size, "max_position_embeddings": recipe.data.sequence_length}
    return config_from_dict({**follow, **recipe.model})


def build_mixture(methods: Sequence[WeightedMethod], part: str) -> Mixture:
    """Open the sources and tasks of `data.<part>` as one mixture; tasks without a weight are one list in it."""
    if not methods:
        raise UserError(f"data.{part} is empty; name at least one source, e.g. data.{part}: [stdlib]")
    sources: list[tuple[Source, float]] = []
    together: list[Task] = []
    for i, method in enumerate(methods):
        options = _parse_data(method, part, f"data.{part}.{i}")
        if method.name in SOURCES:
            sources.append((SOURCES.get(method.name)(options), method.weight or 1.0))
        elif method.weight is not None:
            sources.append((ConversationSource(TASKS.get(method.name)(options)), method.weight))
        else:
            together.append(TASKS.get(method.name)(options))
    if together:
        sources.append((ConversationSource(*together), 1.0))
    return Mixture([source for source, _ in sources], [weight for _, weight in sources])


def build_tasks(recipe: Recipe) -> dict[str, Task]:
    """Build the tasks of `eval.tasks`, by name; a task listed twice gets a number."""
    tasks: dict[str, Task] = {}
    for i, method in enumerate(recipe.eval.tasks):
        name = method.name if method.name not in tasks else f"{method.name}-{i}"
        options = TASKS.parse(method.name, _task_options(method.options), where=f"eval.tasks.{i}")
        tasks[name] = TASKS.get(method.name)(options)
    return tasks


def _parse_data(method: WeightedMethod, part: str, where: str) -> Any:
    """The options of a data source or, when no source has the name, of a task used as data."""
    if method.name in SOURCES:
        split = "train" if part == "train" else "val"
        return SOURCES.parse(method.name, {"split": split, **method.options}, where=where)
    if method.name in TASKS:
        split = "train" if part == "train" else "test"
        return TASKS.parse(method.name, {"split": split, **method.options}, where=where)
    raise UserError(
        f"{where}: unknown data source or task {method.name!r}{nearest(method.name, [*SOURCES, *TASKS])}; "
        f"sources: {', '.join(SOURCES)}; tasks: {', '.join(TASKS)}"
    )


def _task_options(options: dict[str, Any]) -> dict[str, Any]:
    return {"split": "test", **options}
