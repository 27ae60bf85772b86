"""A run for people: tables for the terminal, a JSON file, a picture."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from nanoworks.serve.bench.advice import Advice
from nanoworks.serve.bench.run import Run
from nanoworks.serve.bench.summary import PERCENTILES, Spread, Summary

_ROWS = (
    ("time to first token", "first_token"),
    ("between tokens", "between_tokens"),
    ("per output token", "per_token"),
    ("whole request", "whole"),
)


def print_run(run: Run, summary: Summary, advice: Advice, console: Console) -> None:
    """Print rates, percentiles, failures and advice."""
    load = run.load
    how = f"{load.concurrency} at a time" if load.concurrency is not None else f"{load.rate:g} a second (Poisson)"
    console.print(
        f"\n{load.model} at {load.url}: {load.requests} requests, {how}, {run.seconds:.1f} s\n", highlight=False
    )
    rates = Table(show_header=False, box=None, pad_edge=False)
    for name, value in (
        ("answered", f"{summary.answered}" + (f", {summary.failed} failed" if summary.failed else "")),
        ("requests", f"{summary.requests_per_second:.2f} / s"),
        ("output tokens", f"{summary.output_tokens_per_second:,.0f} / s  ({summary.completion_tokens:,})"),
        ("prompt tokens", f"{summary.prompt_tokens / run.seconds:,.0f} / s  ({summary.prompt_tokens:,})"),
    ):
        rates.add_row(name, value)
    console.print(rates)
    times = Table("milliseconds", "mean", *(f"p{p}" for p in PERCENTILES), "max", box=None, pad_edge=False)
    for column in times.columns[1:]:
        column.justify = "right"
    for title, name in _ROWS:
        spread: Spread | None = getattr(summary, name)
        if spread is not None:
            values = (spread.mean, *spread.percentiles, spread.max)
            times.add_row(title, *(f"{1000 * value:,.1f}" for value in values))
    console.print()
    console.print(times)
    for message, count in summary.errors.items():
        console.print(f"\n{count} failed: {message}", style="red", markup=False, highlight=False)
    console.print(f"\n{advice.headline}", style="bold", highlight=False)
    for line in advice.evidence:
        console.print(f"  {line}", highlight=False)
    if advice.knobs:
        console.print("\nTry:", highlight=False)
    for knob in advice.knobs:
        console.print(f"  - {knob}", markup=False, highlight=False)


def write_json(path: Path, run: Run, summary: Summary, advice: Advice) -> None:
    """Write everything: the load, what came of it, each request, each reading of /metrics. Times are seconds."""
    load = asdict(run.load)
    del load["api_key"]
    content: dict[str, Any] = {
        "load": load,
        "summary": asdict(summary),
        "percentiles": PERCENTILES,
        "advice": asdict(advice),
        "requests": [
            {
                "at": outcome.started - run.started,
                "first": outcome.first,
                "whole": outcome.duration,
                "prompt_tokens": outcome.prompt_tokens,
                "completion_tokens": outcome.completion_tokens,
                "error": outcome.error,
            }
            for outcome in run.outcomes
        ],
        "metrics": [{"at": s.time - run.started, **s.values} for s in run.snapshots],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def plot(path: Path, run: Run, summary: Summary, advice: Advice) -> None:
    """Draw latencies as cumulative shares, and what went on in the server, as a PNG or whatever `path` ends with."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    (first, gaps), (whole, server) = figure.subplots(2, 2)
    good = [outcome for outcome in run.outcomes if not outcome.error]
    for axes, title, values in (
        (first, "time to first token", [o.first for o in good if o.first is not None]),
        (gaps, "between tokens", [gap for o in good for gap in o.gaps]),
        (whole, "whole request", [o.duration for o in good]),
    ):
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("ms")
        axes.set_xscale("log")  # the slowest few take many times what the others take
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylabel("share of " + ("gaps" if axes is gaps else "requests"))
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.25)
        if values:
            shown = 1000 * np.sort(np.array(values))
            axes.plot(shown, np.arange(1, len(shown) + 1) / len(shown), drawstyle="steps-post", color="#2563eb")
            for percent, side in ((50, "right"), (99, "left")):
                where = float(np.percentile(shown, percent))
                axes.axvline(where, color="#9ca3af", linewidth=1, linestyle="--")
                axes.annotate(f"p{percent} {where:,.0f}", (where, 0.03), rotation=90, fontsize=8, ha=side)
    server.set_title("in the server", loc="left", fontsize=10)
    server.set_xlabel("s")
    at = [s.time - run.started for s in run.snapshots]
    for name, label, color in (
        ("num_requests_running", "running", "#2563eb"),
        ("num_requests_waiting", "waiting", "#ea580c"),
    ):
        server.plot(at, [s.get(name) for s in run.snapshots], label=label, color=color)
    server.set_ylabel("requests")
    server.set_ylim(bottom=0)
    server.grid(alpha=0.25)
    usage = server.twinx()
    usage.plot(at, [100 * s.get("kv_cache_usage_perc") for s in run.snapshots], label="KV cache", color="#16a34a")
    usage.set_ylabel("KV cache, % full")
    usage.set_ylim(0, 105)
    lines = [*server.get_lines(), *usage.get_lines()]
    server.legend(
        lines,
        [str(line.get_label()) for line in lines],
        fontsize=8,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.18),
        ncols=3,
    )
    load = run.load
    how = f"{load.concurrency} at a time" if load.concurrency is not None else f"{load.rate:g} a second"
    figure.suptitle(
        f"{load.model}: {load.requests} requests, {how}: {summary.output_tokens_per_second:,.0f} tokens/s\n"
        f"{advice.headline}",
        fontsize=11,
        ha="left",
        x=0.01,
    )
    figure.savefig(path, dpi=120)
