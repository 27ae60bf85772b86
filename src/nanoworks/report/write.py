"""Writes report.md, report.html and report.json, all from the same figures and none ever half written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from nanoworks.common.errors import UserError
from nanoworks.common.files import atomic_write
from nanoworks.report import html, markdown
from nanoworks.report.blocks import Page
from nanoworks.report.collect import collect, collect_stage, find_run
from nanoworks.report.compare import compare, comparison_page
from nanoworks.report.layout import report_page
from nanoworks.report.model import Comparison, Report

PICTURES = "report-plots"


def write_report(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a run, its parents included, or of a folder of runs; return report.html's path.

    `out` is the directory to write to; without it, the run's own.

    Raises:
        UserError: `run_dir` holds no run, or the report cannot be written.
    """
    report = collect(Path(run_dir))
    return _write(report, report_page(report), Path(out if out is not None else report.directory))


def write_comparison(run_dirs: Sequence[str | Path], out: str | Path) -> Path:
    """Write the comparison of runs with the first of them into directory `out`; return report.html's path."""
    comparison = compare([collect_stage(find_run(Path(path))) for path in run_dirs])
    return _write(comparison, comparison_page(comparison), Path(out))


def _write(model: Report | Comparison, page: Page, out: Path) -> Path:
    from nanoworks.report.plots import draw, standalone  # matplotlib takes a second to import

    drawings = {plot.name: draw(plot) for plot in page.plots()}
    pictures = {name: f"{PICTURES}/{_slug(name)}.svg" for name in drawings}
    try:
        (out / PICTURES).mkdir(parents=True, exist_ok=True)
        for name, drawing in drawings.items():
            atomic_write(out / pictures[name], standalone(drawing))
        atomic_write(out / "report.json", model.model_dump_json(indent=1) + "\n")
        atomic_write(out / "report.md", markdown.render(page, pictures))
        atomic_write(out / "report.html", html.render(page, drawings))
    except OSError as error:
        raise UserError(f"cannot write a report to {out}: {error.strerror}; choose a directory with --out") from error
    return out / "report.html"


def _slug(name: str) -> str:
    return re.sub(r"[^\w-]+", "-", name).strip("-").lower()
