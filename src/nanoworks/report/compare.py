"""Compares runs: what differs in their recipes, and their figures beside those of the first, the baseline.

Whether two scores differ is judged by their standard errors: z = difference / sqrt(se_a**2 + se_b**2),
two-sided at 5%. The errors are taken as independent. Scores on the same examples are correlated, so what is
called clear here is clear, and a paired test might find more.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from nanoworks.report import figures
from nanoworks.report.blocks import Block, LinePlot, Note, Page, Plot, Plots, Section, Table
from nanoworks.report.evaluation import doubts_about, metric_of
from nanoworks.report.layout import STAGE_PLOTS, curve_lines
from nanoworks.report.model import (
    Comparison,
    ConfigDifference,
    Evaluation,
    FigureComparison,
    ScoreComparison,
    Stage,
)

CLEAR = 1.96  # standard errors: the two-sided 5% level of a normal distribution
CURVES = [(metric, title) for metric, title, _ in STAGE_PLOTS] + [("val/loss", "Validation loss")]


def compare(runs: Sequence[Stage]) -> Comparison:
    """Compare two or more runs; the first is the baseline."""
    labels = run_labels(runs)
    notes = [f"{label}: {note}" for label, run in zip(labels, runs, strict=True) for note in run.notes]
    if len({run.stage for run in runs}) > 1:
        notes.insert(0, "these runs are of different stages: their losses are measured on different data")
    return Comparison(
        title=" against ".join(labels),
        runs=list(runs),
        config=_config(runs),
        figures=[_figure(figure, runs) for figure in figures.STAGE_FIGURES],
        scores=[_score(task, results) for task, results in _results(runs).items()],
        notes=notes,
    )


def comparison_page(comparison: Comparison) -> Page:
    labels = run_labels(comparison.runs)
    clear = Counter(verdict for score in comparison.scores for verdict in score.verdicts)
    return Page(
        title=comparison.title,
        subtitle=f"Changes are relative to {labels[0]}.",
        tiles=[
            (figures.number(len(comparison.config)), "settings that differ"),
            (figures.number(clear["better"]), "scores clearly better"),
            (figures.number(clear["worse"]), "scores clearly worse"),
            (figures.number(clear["same"] + clear["no clear difference"]), "scores within the noise"),
        ],
        sections=[
            _figures_section(comparison, labels),
            _scores_section(comparison, labels),
            _curves_section(comparison.runs, labels),
            _config_section(comparison, labels),
        ],
        notes=comparison.notes,
    )


def run_labels(runs: Sequence[Stage]) -> list[str]:
    """Return the runs' names, with the directory where two have the same."""
    times = Counter(run.name for run in runs)
    return [run.name if times[run.name] == 1 else f"{run.name} ({run.path})" for run in runs]


def _config(runs: Sequence[Stage]) -> list[ConfigDifference]:
    """Return the settings that are not the same everywhere, but for the names of runs and their places."""
    flat = [figures.flatten(run.config) for run in runs]
    keys = [key for key in dict.fromkeys(key for values in flat for key in values) if key != "run.name"]
    rows = [ConfigDifference(key=key, values=[values.get(key) for values in flat]) for key in keys]
    return [row for row in rows if any(value != row.values[0] for value in row.values)]


def _figure(figure: figures.Figure, runs: Sequence[Stage]) -> FigureComparison:
    values = [figure.of(run) for run in runs]
    base = values[0]
    changes = [None if value is None or not base else value / base - 1 for value in values]
    return FigureComparison(name=figure.name, values=values, changes=[None, *changes[1:]])


def _results(runs: Sequence[Stage]) -> dict[str, list[Evaluation | None]]:
    """Return for each task its newest result in each run."""
    newest = [run.latest_evals() for run in runs]
    tasks = dict.fromkeys(task for evals in newest for task in evals)
    return {task: [evals.get(task) for evals in newest] for task in tasks}


def _score(task: str, results: Sequence[Evaluation | None]) -> ScoreComparison:
    judged = [judge(result, results[0]) for result in results[1:]]
    return ScoreComparison(
        task=task,
        metric=metric_of(results),
        values=[result.value if result else None for result in results],
        stderrs=[result.stderr if result else None for result in results],
        deltas=[None, *(delta for delta, _ in judged)],
        verdicts=[None, *(verdict for _, verdict in judged)],
    )


def judge(new: Evaluation | None, base: Evaluation | None) -> tuple[float | None, str | None]:
    """Return the difference and the verdict on `new`; None for what cannot be said."""
    if new is None or base is None or new.metric != base.metric or new.value is None or base.value is None:
        return None, None
    delta = new.value - base.value
    if delta == 0:
        return delta, "same"
    error = math.hypot(new.stderr or 0.0, base.stderr or 0.0)
    if new.stderr is None or base.stderr is None or error == 0:  # a single example has no spread either
        return delta, None
    if abs(delta) < CLEAR * error:
        return delta, "no clear difference"
    return delta, "better" if (delta < 0) == (new.metric in figures.LOWER_IS_BETTER) else "worse"


def _figures_section(comparison: Comparison, labels: list[str]) -> Section:
    header = ["", labels[0]] + [title for label in labels[1:] for title in (label, "Change")]
    rows = []
    for figure, row in zip(figures.STAGE_FIGURES, comparison.figures, strict=True):
        if any(value is not None for value in row.values):
            cells = [figure.name, figure.text(row.values[0])]
            for value, change in zip(row.values[1:], row.changes[1:], strict=True):
                cells += [figure.text(value), figures.MISSING if change is None else f"{100 * change:+.1f}%"]
            rows.append(cells)
    return Section("Figures", [Table(header, rows)])


def _scores_section(comparison: Comparison, labels: list[str]) -> Section:
    if not comparison.scores:
        return Section("Evaluation", [Note("No task has been evaluated in any of these runs.")])
    others = [title for label in labels[1:] for title in (label, "Change", "Verdict")]
    rows = []
    for score in comparison.scores:
        texts = [figures.score(*pair, score.metric) for pair in zip(score.values, score.stderrs, strict=True)]
        cells = [score.task, texts[0]]
        for text, delta, verdict in zip(texts[1:], score.deltas[1:], score.verdicts[1:], strict=True):
            change = figures.MISSING if delta is None else figures.score_delta(delta, score.metric)
            cells += [text, change, verdict or figures.MISSING]
        rows.append([*cells, score.metric])
    doubts = [Note(text) for task, row in _results(comparison.runs).items() for text in doubts_about(task, row)]
    return Section("Evaluation", [Table(["Task", labels[0], *others, "Metric"], rows), *doubts])


def _curves_section(runs: Sequence[Stage], labels: list[str]) -> Section:
    plots: list[Plot] = []
    for metric, title in CURVES:
        lines = [
            line
            for i, (run, label) in enumerate(zip(runs, labels, strict=True))
            if metric in run.series
            for line in curve_lines(metric, label, run.series[metric], i)
        ]
        if lines:
            plots.append(LinePlot(f"compare-{metric}", title, lines))
    blocks: list[Block] = [Plots(plots)] if plots else [Note("None of these runs has logged anything.")]
    return Section("Curves", blocks)


def _config_section(comparison: Comparison, labels: list[str]) -> Section:
    if not comparison.config:
        return Section("Settings", [Note("The recipes are the same.")])
    rows = [[row.key, *(figures.anything(value) for value in row.values)] for row in comparison.config]
    return Section("Settings that differ", [Table(["Setting", *labels], rows, words=1 + len(labels))])
