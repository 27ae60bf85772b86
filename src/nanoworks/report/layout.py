"""Lays the figures of a report out as a page: what is shown, in which order, under which name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import yaml

from nanoworks.report import figures
from nanoworks.report.blocks import (
    Block,
    Exchange,
    Facts,
    Fold,
    HeatMap,
    Line,
    LinePlot,
    Note,
    Page,
    Plot,
    Plots,
    Section,
    Table,
)
from nanoworks.report.evaluation import evaluation_section
from nanoworks.report.model import Report, Series, Stage

# (metric, title, validation metric drawn into the same plot)
STAGE_PLOTS = (
    ("rl/reward", "Reward", None),
    ("train/loss", "Loss", "val/loss"),
    ("val/bpb", "Validation bits per byte", None),
    ("train/lr", "Learning rate", None),
    ("train/grad_norm", "Gradient norm", None),
    ("train/tokens_per_second", "Tokens per second", None),
    ("moe/entropy", "Entropy of the use of experts (1: all alike)", None),
    ("moe/imbalance", "Busiest expert over the even share", None),
    ("rl/kl", "KL from the reference", None),
    ("rl/length", "Tokens in an answer", None),
    ("rl/logprob_gap", "Log-probability gap, engine and trainer", None),
)
EXACT = {"train/lr"}  # set, not measured: a mean would only blur it
FEW_POINTS = 40  # measured now and then: shown as they are, not behind a running mean


def report_page(report: Report) -> Page:
    labels = stage_labels(report.stages)
    last = report.stages[-1]
    notes = report.notes + [
        f"{label}: {note}" for label, stage in zip(labels, report.stages, strict=True) for note in stage.notes
    ]
    sections = [
        Section("Training", [_stages_table(report.stages, labels)]),
        evaluation_section(report.stages, labels),
        *(_stage_section(stage, labels[i], color=i) for i, stage in enumerate(report.stages)),
        _samples_section(report.stages, labels),
        Section("Model", [_facts(last.model, "run.json says nothing of the model.")]),
        _data_section(report.stages, labels),
        Section("Tokenizer", [_facts(last.tokenizer, "run.json says nothing of the tokenizer.")]),
        _environment_section(report.stages, labels),
    ]
    return Page(
        title=report.title,
        subtitle=f"{' → '.join(labels)} · started {figures.date(report.stages[0].created)}",
        tiles=_tiles(report),
        sections=sections,
        notes=notes,
    )


def stage_labels(stages: Sequence[Stage]) -> list[str]:
    """Return the stages' names, with the run's where two are of the same stage."""
    times = Counter(stage.stage for stage in stages)
    return [stage.stage if times[stage.stage] == 1 else f"{stage.stage} ({stage.name})" for stage in stages]


def curve_lines(metric: str, label: str, series: Series, color: int) -> list[Line]:
    """Return one metric as lines: few points as dots, many as a running mean over the faint raw values."""
    if metric in EXACT:
        return [Line(label, series.steps, series.values, color)]
    if len(series.steps) <= FEW_POINTS:
        return [Line(label, series.steps, series.values, color, "dots")]
    return [
        Line("", series.steps, series.values, color, "faint"),
        Line(label, series.steps, series.smooth, color),
    ]


def _tiles(report: Report) -> list[tuple[str, str]]:
    last = report.stages[-1]
    parameters = last.model.get("parameters")
    tokens = [stage.tokens for stage in report.stages if stage.tokens is not None]
    bpb = [(stage.stage, stage.val_bpb.last) for stage in report.stages if stage.val_bpb is not None]
    tiles = [
        (figures.duration(report.total_seconds), "total time"),
        (figures.count(sum(tokens)) if tokens else figures.MISSING, "supervised tokens"),
        (figures.count(parameters if isinstance(parameters, (int, float)) else None), "parameters"),
    ]
    if bpb:
        name, value = bpb[-1]
        tiles.append((figures.loss(value), f"validation bpb, {name}"))
    if last.reward is not None:
        tiles.append((figures.loss(last.reward.last), "last reward"))
    elif last.loss is not None:
        tiles.append((figures.loss(last.loss.last), "last loss"))
    return tiles


def _stages_table(stages: Sequence[Stage], labels: list[str]) -> Table:
    rows = [["Status", *(stage.status for stage in stages)]]
    for figure in figures.STAGE_FIGURES:
        values = [figure.of(stage) for stage in stages]
        if any(value is not None for value in values):
            rows.append([figure.name, *map(figure.text, values)])
    return Table(["", *labels], rows)


def _stage_section(stage: Stage, label: str, color: int) -> Section:
    plots: list[Plot] = []
    for metric, title, companion in STAGE_PLOTS:
        if metric not in stage.series:
            continue
        lines = curve_lines(metric, "training" if companion else "", stage.series[metric], color)
        if companion in stage.series:
            validation = stage.series[companion]
            lines.append(Line("validation", validation.steps, validation.values, color + 1, "dots"))
        plots.append(LinePlot(f"{color + 1}-{label}-{metric}", title, lines))
    plots += _expert_plots(stage, f"{color + 1}-{label}", color)
    tasks = [name for name in stage.series if name.startswith("eval/") and len(stage.series[name].steps) > 1]
    if tasks:
        lines = [
            Line(name.removeprefix("eval/"), stage.series[name].steps, stage.series[name].values, i, "dots")
            for i, name in enumerate(tasks)
        ]
        plots.append(LinePlot(f"{color + 1}-{label}-eval", "Task scores during training", lines))
    blocks: list[Block] = [Plots(plots)] if plots else [Note("Nothing has been logged yet.")]
    if stage.config:
        blocks.append(Fold("Recipe", yaml.safe_dump(stage.config, sort_keys=False, allow_unicode=True)))
    return Section(f"Stage: {label}", blocks)


def _expert_plots(stage: Stage, name: str, color: int) -> list[Plot]:
    """The use of experts by layer, and the share of choices dropped where any were."""
    plots: list[Plot] = []
    drops = stage.series.get("moe/drop_rate")
    if drops is not None and any(drops.values):
        lines = curve_lines("moe/drop_rate", "", drops, color)
        plots.append(LinePlot(f"{name}-moe/drop_rate", "Share of the choices of experts dropped", lines))
    if (use := stage.experts) is not None:
        values = [[share * len(shares) for share in shares] for shares in use.shares]
        darkest = max(2.0, *(max(row) for row in values))
        title = (
            f"Use of experts, steps {figures.number(use.first_step)} to {figures.number(use.last_step)} "
            f"(1: the even share; darkest: {figures.number(round(darkest, 2))})"
        )
        rows = [f"layer {layer}" for layer in use.layers]
        plots.append(HeatMap(f"{name}-experts", title, rows, "expert", values, darkest))
    return plots


def _samples_section(stages: Sequence[Stage], labels: list[str]) -> Section:
    blocks: list[Block] = [
        Exchange(f"{label}, step {sample.step:,}", sample.prompt, sample.completion)
        for label, stage in zip(labels, stages, strict=True)
        for sample in stage.samples
    ]
    return Section("Samples", blocks or [Note("No samples were taken.")])


def _data_section(stages: Sequence[Stage], labels: list[str]) -> Section:
    rows = []
    for label, stage in zip(labels, stages, strict=True):
        data = stage.config.get("data") if isinstance(stage.config.get("data"), dict) else {}
        rows.append(
            [
                label,
                _methods(data.get("train")) if data else figures.MISSING,
                _methods(data.get("validation")) if data else figures.MISSING,
                figures.anything(data.get("sequence_length")) if data else figures.MISSING,
                figures.count(stage.tokens),
            ]
        )
    header = ["Stage", "Training data", "Validation data", "Row length", "Supervised tokens"]
    return Section("Data", [Table(header, rows, words=3)])


def _methods(value: Any) -> str:
    """Return a mixture in words: `stdlib, microworld ×2 (split: train)`."""
    if not isinstance(value, list) or not value:
        return figures.MISSING
    texts = []
    for item in value:
        if not isinstance(item, dict):
            texts.append(str(item))
            continue
        options = {key: item[key] for key in item if key not in ("name", "weight")}
        share = "" if item.get("weight", 1.0) == 1.0 else f" ×{figures.number(item['weight'])}"
        details = ", ".join(f"{key}: {figures.anything(v)}" for key, v in options.items())
        texts.append(f"{item.get('name')}{share}" + (f" ({details})" if details else ""))
    return ", ".join(texts)


def _environment_section(stages: Sequence[Stage], labels: list[str]) -> Section:
    """The last stage's machine; where another stage ran on something else, what differed."""
    last = stages[-1].environment
    blocks: list[Block] = [_facts(last, "run.json says nothing of the environment.")]
    for label, stage in zip(labels[:-1], stages[:-1], strict=True):
        keys = [key for key in {**stage.environment, **last} if stage.environment.get(key) != last.get(key)]
        if keys:
            differences = ", ".join(f"{key} {figures.anything(stage.environment.get(key))}" for key in keys)
            blocks.append(Note(f"{label} ran with {differences}."))
    return Section("Environment", blocks)


def _facts(values: dict[str, Any], otherwise: str) -> Block:
    flat = figures.flatten(values)
    rows = [(key, figures.anything(value)) for key, value in flat.items() if value is not None]
    return Facts(rows) if rows else Note(otherwise)
