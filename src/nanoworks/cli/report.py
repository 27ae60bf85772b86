"""`nanoworks report RUN [RUN...]`: write the report of a run, or compare runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report_command(
    runs: Annotated[list[Path], typer.Argument(help="A run, or a folder of runs; two or more runs are compared.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Directory to write to. Default: the run's own; for a comparison ./report."),
    ] = None,
) -> None:
    """Write report.md, .html and .json of a run and of the stages it came from, or compare runs."""
    from nanoworks.report import write_comparison, write_report

    page = write_report(runs[0], out) if len(runs) == 1 else write_comparison(runs, out or Path("report"))
    typer.echo(f"wrote {page} (and report.md, report.json beside it)")
