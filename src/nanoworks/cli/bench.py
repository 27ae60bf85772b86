"""`nanoworks bench serve URL`: put a server under load, see what its clients feel and what holds it up."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measure what was built."""


@app.command("serve")
def bench_serve_command(
    url: Annotated[str, typer.Argument(help="Of any server with OpenAI's API.")] = "http://127.0.0.1:8000",
    requests: Annotated[int, typer.Option(min=1, help="How many in all.")] = 200,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Requests at a time, the next when one ends; default 16.")
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(min=0.001, help="Instead: requests a second at random times, however slow the server is."),
    ] = None,
    prompt_tokens: Annotated[
        str, typer.Option(help="Lengths: 128, 64-256 (evenly between), or 128~0.5 (log-normal: median~sigma).")
    ] = "128",
    output_tokens: Annotated[str, typer.Option(help="Lengths of answers, written alike.")] = "64",
    exact_output: Annotated[
        bool, typer.Option(help="Ask for exactly that many (`min_tokens`, which OpenAI's own servers refuse).")
    ] = True,
    temperature: Annotated[float | None, typer.Option(min=0, help="Default: the server's.")] = None,
    endpoint: Annotated[Literal["chat", "completions"], typer.Option(help="Which of OpenAI's.")] = "chat",
    model: Annotated[str | None, typer.Option(help="Its name; default: the first that the server has.")] = None,
    api_key: Annotated[str, typer.Option(envvar="NANOWORKS_API_KEY", help="Where the server asks for one.")] = "",
    seed: Annotated[
        int | None, typer.Option(help="Repeats prompts and times; default: new ones, which no cache has seen.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write everything here: each request, each reading.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a picture here, e.g. load.png.")] = None,
) -> None:
    """Send requests to a server; print rates, percentiles of its latencies, and which of its knobs to turn."""
    import random

    from rich.console import Console
    from rich.progress import Progress

    from nanoworks.common.errors import UserError
    from nanoworks.serve.bench import Lengths, Load, advise, run_load, summarize
    from nanoworks.serve.bench.client import first_model, server_url
    from nanoworks.serve.bench.show import plot as draw
    from nanoworks.serve.bench.show import print_run, write_json

    for path in (json, plot):
        if path is not None and not path.resolve().parent.is_dir():
            raise UserError(f"there is no folder {path.parent} to write {path.name} into; make it first")
    if concurrency is None and rate is None:
        concurrency = 16
    prompts, answers = Lengths.parse(prompt_tokens), Lengths.parse(output_tokens)
    url = server_url(url)
    load = Load(
        url=url,
        model=model or first_model(url, api_key),
        endpoint=endpoint,
        requests=requests,
        concurrency=concurrency,
        rate=rate,
        prompt_tokens=prompts,
        output_tokens=answers,
        exact_output=exact_output,
        temperature=temperature,
        api_key=api_key,
        seed=random.randrange(2**32) if seed is None else seed,
    )
    console = Console()
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("requests", total=requests)
        run = run_load(load, progress=lambda: progress.advance(bar))
    summary, advice = summarize(run), advise(run.snapshots)
    print_run(run, summary, advice, console)
    if json is not None:
        write_json(json, run, summary, advice)
    if plot is not None:
        draw(plot, run, summary, advice)
    if not summary.answered:
        raise UserError("no request was answered; see the messages above")
