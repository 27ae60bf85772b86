"""`nanoworks eval CHECKPOINT --tasks ...`: score a model on benchmarks, own tasks, CORE, bits per byte."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from nanoworks.evals import TaskResult


def eval_command(
    checkpoint: Annotated[str, typer.Argument(help="A run, a step, a model directory or a hub id.")],
    tasks: Annotated[
        str,
        typer.Option(
            help="Names with commas between: tasks (gsm8k, mmlu, ...), core, bpb, chat (the six of "
            "nanochat's ChatCORE), or the .yaml files of custom tasks."
        ),
    ],
    path: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="Local data of a task instead of the hub's; may be repeated."),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME.KEY=VALUE", help="An option of a task, e.g. gsm8k.split=train; may be repeated."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of each task; default: all.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Answers to each question, for pass@k.")] = 1,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample among the k likeliest tokens; 0 means all.")] = 0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    plain: Annotated[
        bool, typer.Option("--plain", help="Ask in plain text (Question: ... Answer:), for a base model.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    unsafe: Annotated[
        bool, typer.Option("--unsafe", help="Run generated code even where it cannot be isolated.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory for the results; default: evals/ of the run, if it is a run's checkpoint."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON and nothing else.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, xpu or mps.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; default: as stored.")] = None,
    tensor_parallel: Annotated[
        int, typer.Option(min=1, help="Processes to spread the model over; a GPU each, or the CPU's threads shared.")
    ] = 1,
    quantize: Annotated[
        Literal["none", "int8", "int4"],
        typer.Option(
            help="Round the weights while loading: int8 takes half the memory of bfloat16 and is hardly less exact, "
            "int4 a quarter and is noticeably less exact in small models."
        ),
    ] = "none",
    kv_dtype: Annotated[
        Literal["auto", "int8"],
        typer.Option(
            help="Of the keys and values of past tokens: int8 holds nearly twice the tokens of bfloat16; CPU only."
        ),
    ] = "auto",
) -> None:
    """Score a model; the examples and what the model said to each are kept beside the figures."""
    import json

    import nanoworks
    from nanoworks.engine import EngineConfig
    from nanoworks.evals import Settings, Suite

    settings = Settings(
        max_examples=limit,
        samples=samples,
        temperature=temperature,
        top_k=top_k or None,
        max_tokens=max_tokens,
        chat=not plain,
        seed=seed,
    )
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    options = _options(path or [], option or [])
    if unsafe and not {"chat", "humaneval"}.isdisjoint(names):
        options.setdefault("humaneval", {})["allow_unsandboxed"] = True
    suite = Suite(names, options)
    model = nanoworks.load(checkpoint, device=device, dtype=dtype, tensor_parallel=tensor_parallel)
    place = model.checkpoint.path
    step = model.checkpoint.metadata.get("step")
    if out is None and (place.parent / "run.json").is_file():
        out = place.parent / "evals" / place.name
    config = EngineConfig(quantize=None if quantize == "none" else quantize, kv_dtype=kv_dtype)
    engine, tokenizer = model.engine(config, consume=True), model.tokenizer
    results = list(suite.run(engine, tokenizer, settings, out=out, step=step, progress=not as_json))
    if as_json:
        summaries = [result.summary(step) for result in results]
        print(json.dumps({"checkpoint": str(place), "step": step, "results": summaries}, indent=2))
    else:
        _show(results, str(place), out)
    if any(result.error for result in results):
        raise typer.Exit(1)


def _options(paths: list[str], options: list[str]) -> dict[str, dict[str, Any]]:
    """`gsm8k=FILE` and `gsm8k.split=train` -> {"gsm8k": {"path": FILE, "split": "train"}}."""
    import yaml

    from nanoworks.common.errors import UserError

    parsed: dict[str, dict[str, Any]] = {}
    for given in paths:
        name, _, file = given.partition("=")
        if not name or not file:
            raise UserError(f"--path {given!r} is not of the form NAME=FILE, e.g. gsm8k=test.jsonl")
        parsed.setdefault(name, {})["path"] = file
    for given in options:
        target, _, value = given.partition("=")
        name, _, key = target.rpartition(".")  # the last dot: the name may be a file
        if not name or not key or not value:
            raise UserError(f"--option {given!r} is not of the form NAME.KEY=VALUE, e.g. gsm8k.split=train")
        parsed.setdefault(name, {})[key] = yaml.safe_load(value)
    return parsed


def _show(results: Sequence[TaskResult], checkpoint: str, out: Path | None) -> None:
    import math

    from rich.console import Console
    from rich.table import Table

    from nanoworks.common.human import percent

    table = Table("task", "result", "± stderr", "guessing", "n", "metric", title=checkpoint)
    for result in results:
        if result.error:
            table.add_row(result.task, "[red]failed[/red]")
            continue
        show = percent if result.metric in ("accuracy", "pass@1") else "{:.4f}".format
        table.add_row(
            result.task,
            show(result.value),
            show(result.stderr) if math.isfinite(result.stderr) else "",
            percent(result.baseline) if result.baseline else "",
            f"{result.n:,}" + (f" ({result.failed} failed)" if result.failed else ""),
            result.metric,
        )
        for part, value in result.details.items():
            table.add_row(f"  {part}", _part(value), style="dim")
    console = Console()
    console.print(table)
    if out is not None:
        console.print(f"every example is in {out}", soft_wrap=True)


def _part(value: Any) -> str:
    """A figure of a composite: a number, or the mapping that CORE keeps of a task."""
    from nanoworks.common.human import percent

    if isinstance(value, dict):
        return percent(value["accuracy"]) if "accuracy" in value else f"[red]{value['error']}[/red]"
    return f"{value:.4f}"
