"""`nanoworks plan RECIPE --gpus 8xH200`: what a recipe would take, and which way of spreading it is the best."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from nanoworks.train.plan import Forecast, Planned
    from nanoworks.train.plan.measure import Measured


def plan_command(
    recipe: Annotated[str, typer.Argument(help="A YAML or JSON file, or the name of a recipe that comes along.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[PATH=VALUE]...")] = None,
    gpus: Annotated[str, typer.Option(help="So many of a kind: 8xH200, 4xA6000, 1x24GB, cpu, 2xmine.yaml.")] = "cpu",
    top: Annotated[int, typer.Option(min=1, help="Ways to show.")] = 5,
    everything: Annotated[
        bool, typer.Option("--everything", help="Also ways that training does not offer (yet).")
    ] = False,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Run some micro-batches of the best way here and correct the times; under torchrun on its ranks.",
        ),
    ] = False,
    vocab_size: Annotated[int | None, typer.Option(help="Instead of the tokenizer's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON and nothing else.")] = False,
    profile: Annotated[str | None, typer.Option(help="Overlay: dev, test, prod, or one of the recipe's own.")] = None,
) -> None:
    """Predict memory, speed, time and cost of a recipe on devices that need not be here, and rank the ways to run it.

    Examples:

      nanoworks plan pretrain/llama-1b --gpus 8xH200

      nanoworks plan pretrain/llama-3b --gpus 4xA6000 hardware.compile=true --json

    docs/scaling.md says what the figures assume.
    """
    import json
    import os

    import torch

    from nanoworks.config import load_recipe
    from nanoworks.train.plan import cluster, plan, workload
    from nanoworks.train.plan.measure import measure as run

    devices = cluster(gpus)
    work = workload(
        load_recipe(recipe, overrides or (), profile=profile),
        torch.device(devices.hardware.device),
        vocab_size=vocab_size,
    )
    planned, measured = plan(work, devices, everything=everything), None
    if measure:
        measured = run(work, devices, _told(planned.best()))
        planned = plan(work, devices, everything=everything, scale=measured.scale)
    if int(os.environ.get("RANK", "0")) > 0:
        return
    if as_json:
        typer.echo(json.dumps(_as_dict(planned, measured), indent=2))
        return
    _print(planned, measured, top)


def _told(best: Forecast) -> Forecast:
    """What the first rank found the best: what is free, and so the choice, differs from moment to moment."""
    import torch.distributed as dist

    from nanoworks.common.device import choose_device
    from nanoworks.parallel import own_device
    from nanoworks.parallel.mesh import world_size
    from nanoworks.parallel.rendezvous import start_group

    if world_size() == 1:
        return best
    start_group(own_device(choose_device("auto")), best.section)
    found = [best]
    dist.broadcast_object_list(found)
    return found[0]


def _as_dict(planned: Planned, measured: Measured | None) -> dict[str, object]:
    from dataclasses import asdict

    return {
        "devices": str(planned.cluster),
        "parameters": planned.work.model.num_parameters(),
        "active_parameters": planned.work.model.num_active_parameters(),
        "tokens": planned.work.tokens,
        "notes": list(planned.work.notes),
        "measured": None if measured is None else {**asdict(measured), "scale": measured.scale},
        "ways": [f.to_dict() for f in planned.forecasts],
        "refused": [asdict(r) for r in planned.refused],
    }


def _print(planned: Planned, measured: Measured | None, top: int) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from nanoworks.common.human import count, duration, percent

    console, work = Console(), planned.work
    length = "unknown length" if work.tokens is None else f"{count(work.tokens)} tokens"
    console.print(
        f"[bold]{work.recipe.run.name}[/] on {planned.cluster}: {count(work.model.num_parameters())} parameters, "
        f"{length}, steps of {count(work.tokens_per_step)} tokens in rows of {work.sequence_length}"
    )
    for note in work.notes:
        console.print(f"note: {note}")
    if measured is not None:
        console.print(
            f"measured: a micro-batch took {measured.seconds:.2f} s, {measured.predicted_seconds:.2f} s were "
            f"predicted; all arithmetic below is times {measured.scale:.2f}"
        )
    if planned.forecasts:
        table = Table(title="ways to run it, the best first", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column in ("way", "rows", "redo", "GiB", "step", "tokens/s", "MFU", "time", "cost"):
            table.add_column(column, no_wrap=True)
        for f in planned.forecasts[:top]:
            table.add_row(
                f.name,
                f"{f.rows} x {f.micro_batches}",
                f.checkpointing,
                f"{f.memory.total / 2**30:.1f}",
                f"{f.seconds.total:.2f} s",
                count(f.tokens_per_second),
                percent(f.mfu),
                "" if f.hours is None else duration(f.hours * 3600),
                "" if f.dollars is None else f"${count(f.dollars)}",
            )
        console.print(table)
        _print_best(console, planned.forecasts[0])
    if planned.refused:
        table = Table("refused", "because", title="what is out")
        for what, why in _by_reason(planned):
            table.add_row(what, why)
        console.print(table)
    if not planned.forecasts:
        planned.best()  # raises, with the reasons


def _print_best(console: object, best: Forecast) -> None:
    from rich.console import Console
    from rich.table import Table

    assert isinstance(console, Console)
    table = Table("memory of a rank", "GiB", "a step", "s", title=f"the best: {best.name}")
    memory = [(name.replace("_", " "), value / 2**30) for name, value in vars(best.memory).items()]
    seconds = list(vars(best.seconds).items())
    for i in range(max(len(memory), len(seconds))):
        left = (memory[i][0], f"{memory[i][1]:.2f}") if i < len(memory) else ("", "")
        right = (seconds[i][0], f"{seconds[i][1]:.3f}") if i < len(seconds) else ("", "")
        table.add_row(*left, *right)
    console.print(table)
    sent = f"each rank sends {best.traffic.total / 1e9:.1f} GB a step"
    if best.bubble:
        sent += f"; stages wait {100 * best.bubble:.1f}% of the time"
    console.print(sent)
    console.print("nanoworks train ... " + " ".join(best.overrides), soft_wrap=True)


def _by_reason(planned: Planned) -> list[tuple[str, str]]:
    """Refusals with the same reason on one line."""
    by_reason: dict[str, list[str]] = {}
    for refusal in planned.refused:
        by_reason.setdefault(refusal.reason, []).append(refusal.what)
    lines = []
    for reason, whats in by_reason.items():
        more = f" and {len(whats) - 2} more" if len(whats) > 2 else ""
        lines.append(("; ".join(whats[:2]) + more, reason))
    return lines
