"""Several evaluations of one model by name, and what they amount to together.

A name is a task of the registry, `core`, `bpb`, the `.yaml` file of a custom task, or `chat`: the six tasks
of nanochat's ChatCORE. Names and options are checked before the first one runs; after that one that fails is
recorded as failed and the others go on.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from nanoworks.common.errors import UserError, nearest
from nanoworks.common.validation import explain
from nanoworks.config.base import Frozen
from nanoworks.engine import Engine
from nanoworks.evals.bpb import BpbOptions, text_bits_per_byte
from nanoworks.evals.core import evaluate_core
from nanoworks.evals.core_bundle import OFFICIAL_BUNDLE
from nanoworks.evals.result import TaskResult
from nanoworks.evals.runner import Settings, evaluate
from nanoworks.tasks import TASKS
from nanoworks.tokenizer import Tokenizer

log = logging.getLogger("nanoworks")

CHAT_TASKS = ("arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval", "spelling_bee")


class CoreOptions(Frozen):
    path: str = Field(default=OFFICIAL_BUNDLE, description="bundle: directory, .zip, or address of the .zip")


Run = Callable[[Engine, Tokenizer, Settings, bool], TaskResult]


class Suite:
    def __init__(self, names: Sequence[str], options: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """`options` are those of each evaluation, by its name.

        Raises:
            UserError: an unknown name or option.
        """
        options = options or {}
        if not names:
            raise UserError("no task is named; give some, e.g. gsm8k,mmlu,bpb")
        names = [part for name in names for part in (CHAT_TASKS if name == "chat" else (name,))]
        for name in options:
            if name not in names:
                raise UserError(f"there are options for {name!r}, which is not evaluated{nearest(name, names)}")
        self._runs = {name: _prepare(name, options.get(name, {})) for name in names}

    def run(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        settings: Settings,
        *,
        out: Path | None = None,
        step: int | None = None,
        progress: bool = False,
    ) -> Iterator[TaskResult]:
        """Yield each result as it comes; last ChatCORE, if all its tasks were among them and none failed.

        Every result is written to `out` at once, so what was measured survives an interruption.
        """
        results: dict[str, TaskResult] = {}
        for name, run in self._runs.items():
            try:
                results[name] = run(engine, tokenizer, settings, progress)
            except Exception as error:
                said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                log.warning("%s failed: %s", name, said)
                results[name] = TaskResult(Path(name).stem, "failed", "none", math.nan, error=said)
            yield _written(results[name], out, step)
        if all(name in results and results[name].error is None for name in CHAT_TASKS):
            yield _written(chat_core([results[name] for name in CHAT_TASKS]), out, step)


def chat_core(results: Sequence[TaskResult]) -> TaskResult:
    """Return the mean of the centered accuracies: 0 for guessing everywhere, 1 for perfection."""
    n = len(results)
    spread = math.fsum((result.stderr / (1 - result.baseline)) ** 2 for result in results)
    return TaskResult(
        task="chat_core",
        kind="composite",
        metric="mean centered accuracy",
        value=math.fsum(result.centered for result in results) / n,
        stderr=math.sqrt(spread) / n,
        n=sum(result.n for result in results),
        details={result.task: result.centered for result in results},
    )


def _written(result: TaskResult, out: Path | None, step: int | None) -> TaskResult:
    if out is not None:
        result.write(out, step=step)
    return result


def _prepare(name: str, values: Mapping[str, Any]) -> Run:
    """Return how to run `name`, its options checked; the data is read only when it runs."""
    if name == "core":
        core = _parse(CoreOptions, name, values)
        return lambda engine, tokenizer, settings, progress: evaluate_core(
            engine, tokenizer, core.path, max_examples=settings.max_examples, progress=progress
        )
    if name == "bpb":
        bpb = _parse(BpbOptions, name, values)
        return lambda engine, tokenizer, settings, progress: _bits_per_byte(engine, tokenizer, bpb)
    if name.endswith((".yaml", ".yml")):
        task, values = "custom", {"path": name, **values}
    elif name in TASKS:
        task = name
    else:
        known = [*TASKS, "bpb", "chat", "core"]
        raise UserError(f"unknown evaluation {name!r}{nearest(name, known)}; known: {', '.join(sorted(known))}")
    parsed = TASKS.parse(task, values, where=name)
    called = None if task == "custom" else name
    return lambda engine, tokenizer, settings, progress: evaluate(
        engine, tokenizer, TASKS.get(task)(parsed), name=called, progress=progress, **asdict(settings)
    )


def _parse(model: type[Frozen], name: str, values: Mapping[str, Any]) -> Any:
    try:
        return model(**values)
    except ValidationError as error:
        raise UserError(explain(error, model, prefix=name)) from None


def _bits_per_byte(engine: Engine, tokenizer: Tokenizer, options: BpbOptions) -> TaskResult:
    measured = text_bits_per_byte(engine.model, tokenizer, options)
    return TaskResult(
        task="bpb",
        kind="language_modeling",
        metric="bits per byte",
        value=measured["bpb"],
        n=int(measured["tokens"]),
        settings=options.model_dump(),
        details={"loss": measured["loss"]},
    )
