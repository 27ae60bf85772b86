"""`nanoworks demo`: from raw text to a chat, on a CPU, in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo_command(
    out: Annotated[Path, typer.Option(help="Directory of the runs; an interrupted demo in it goes on.")] = Path(
        "runs/demo"
    ),
    recipe: Annotated[str, typer.Option(help="The pipeline to run.")] = "demo/demo",
    seed: Annotated[int, typer.Option(help="Same seed, same figures.")] = 42,
) -> None:
    """Train a tiny chat model from raw text through every stage: tokenizer, pretraining, midtraining, SFT, RL,
    evaluation, report, and a first conversation. Everything offline: the text is the standard library of the
    running Python and a small invented world."""
    import time

    from rich.console import Console

    from nanoworks.api import load
    from nanoworks.config.pipeline import load_pipeline
    from nanoworks.engine import SamplingParams
    from nanoworks.report import write_report
    from nanoworks.serve.session import ChatSession
    from nanoworks.serve.terminal import show
    from nanoworks.train.pipeline import run_pipeline

    console = Console()
    pipeline, recipes = load_pipeline(recipe)
    started = time.perf_counter()
    last: Path | None = None
    for number, stage in enumerate(run_pipeline(pipeline, recipes, out, overrides=[f"run.seed={seed}"]), start=1):
        last = stage.run
        if not stage.is_main:  # under torchrun the first rank talks, and writes the report
            continue
        if not stage.finished:
            console.print(f"[yellow]stopped and saved[/yellow]; go on with: nanoworks demo --out {out}")
            return
        seconds = time.perf_counter() - started
        console.print(f"[green]stage {number} of {len(recipes)}[/green] {stage.run.name} done after {seconds:.0f} s")
    assert last is not None
    if not stage.is_main:
        return
    report = write_report(last)
    session = ChatSession(load(last).engine(), SamplingParams(temperature=0.0))
    for prompt in pipeline.prompts:
        console.print(f"\n[bold]> {prompt}[/bold]")
        show(session.ask(prompt), session)
        session.clear()
    seconds = time.perf_counter() - started
    for line in (
        f"\nThe whole demo took {seconds:.0f} s. Report: {report}",
        f"Talk to it here:   nanoworks chat {last}",
        f"or in a browser:   nanoworks serve {last}   then open http://127.0.0.1:8000",
    ):
        console.print(line, soft_wrap=True, highlight=False)
