"""The evaluation section of a report: tasks by stages, as a table and as bars, with what to doubt about them."""

from __future__ import annotations

from collections.abc import Sequence

from nanoworks.report import figures
from nanoworks.report.blocks import BarPlot, Block, Note, Plots, Section, Table
from nanoworks.report.model import Evaluation, Stage


def evaluation_section(stages: Sequence[Stage], labels: Sequence[str]) -> Section:
    """Lay out the newest score of each task in each stage that has any."""
    scored = {label: evals for label, stage in zip(labels, stages, strict=True) if (evals := stage.latest_evals())}
    tasks = dict.fromkeys(task for evals in scored.values() for task in evals)
    if not tasks:
        return Section("Evaluation", [Note("No task has been evaluated yet.")])
    results = {task: [evals.get(task) for evals in scored.values()] for task in tasks}
    table = Table(
        ["Task", *scored, "Guessing", "Examples", "Metric"], [_row(task, row) for task, row in results.items()]
    )
    doubts = [Note(text) for task, row in results.items() for text in doubts_about(task, row)]
    fractions = {task: row for task, row in results.items() if metric_of(row) not in figures.NOT_A_FRACTION}
    bars: list[Block] = [Plots([_bars(fractions, list(scored))])] if fractions else []
    return Section("Evaluation", [table, *doubts, *bars])


def metric_of(results: Sequence[Evaluation | None]) -> str:
    """Return what the scores of a task measure; a failed evaluation does not know."""
    known = [result for result in results if result is not None]
    return next((result.metric for result in known if result.error is None), known[0].metric)


def _row(task: str, results: Sequence[Evaluation | None]) -> list[str]:
    known = [result for result in results if result is not None]
    examples = dict.fromkeys(figures.number(result.n) for result in known)
    guessing = figures.score(known[-1].baseline or None, None, metric_of(results))
    return [task, *(_score(result) for result in results), guessing, " / ".join(examples), metric_of(results)]


def _score(result: Evaluation | None) -> str:
    return figures.MISSING if result is None else figures.score(result.value, result.stderr, result.metric)


def doubts_about(task: str, results: Sequence[Evaluation | None]) -> list[str]:
    """Return what a reader must know before trusting the scores of a task."""
    known = [result for result in results if result is not None]
    good = [result for result in known if result.error is None]
    doubts = [f"{task} failed: {result.error}" for result in known if result.error is not None]
    doubts += [
        f"{task}: {result.failed} of {figures.number(result.n)} examples could not be run and count as wrong."
        for result in good
        if result.failed
    ]
    if any(result.settings != good[0].settings for result in good):
        doubts.append(f"{task} was not run with the same settings everywhere: its scores are not comparable.")
    return doubts


def _bars(results: dict[str, list[Evaluation | None]], labels: list[str]) -> BarPlot:
    return BarPlot(
        "evaluation",
        "Scores by stage",
        rows=list(results),
        labels=labels,
        values=[[result.value if result else None for result in row] for row in results.values()],
        errors=[[result.stderr if result else None for result in row] for row in results.values()],
    )
