"""Reads run directories into the figures of a report.

A run may be in progress, interrupted or damaged: whatever is missing becomes a note, never an error. Only a
path that holds no run at all is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from nanoworks.common.errors import UserError
from nanoworks.report import series
from nanoworks.report.model import Evaluation, ExpertUse, Report, Sample, Stage
from nanoworks.trackers.jsonl import METRICS_FILE, read_jsonl

EXPERTS_FILE = "experts.jsonl"  # train.experts writes it
EXPERTS_ROWS = 10  # recorded steps that the use of experts is the mean of
MAX_SAMPLES = 12
MAX_SAMPLE_CHARACTERS = 4000

T = TypeVar("T")


def collect(path: Path) -> Report:
    """Return the report of a run with the runs it started from, or of all runs in a folder (oldest first).

    Raises:
        UserError: there is no run at `path`.
    """
    folder = runs_inside(path)
    directories, notes = (folder, []) if folder else chain_of(find_run(path))
    stages = [collect_stage(directory) for directory in directories]
    known = [stage.elapsed_seconds for stage in stages if stage.elapsed_seconds is not None]
    return Report(
        title=path.resolve().name if folder else stages[-1].name,
        directory=str(path if folder else directories[-1]),
        stages=stages,
        total_seconds=sum(known) if known else None,
        notes=notes,
    )


def find_run(path: Path) -> Path:
    """Return the run that `path` is, or is a checkpoint of; UserError where there is none."""
    for candidate in (path, path.parent):
        if _is_run(candidate):
            return candidate
    raise UserError(
        f"no run at {path}: a run is a directory with run.json or {METRICS_FILE}, "
        "as `nanoworks train` writes it below runs/"
    )


def collect_stage(directory: Path) -> Stage:
    """Return the figures of one run directory."""
    notes: list[str] = []
    info = _read(directory / "run.json", json.loads, notes)
    config = _read(directory / "config.yaml", _parse_yaml, notes)
    rows, unreadable = read_jsonl(directory / METRICS_FILE)
    if unreadable:
        notes.append(f"{METRICS_FILE}: {unreadable} unreadable line(s) skipped")
    curves, not_finite = series.curves(rows)
    notes += [f"{name} was not finite at step {step}" for name, step in sorted(not_finite.items())]
    if not curves:
        notes.append("no metrics yet")
    status = str(info.get("status", "unknown"))
    if status != "finished":
        notes.append(f"the run is not finished (status: {status}): figures are those of its last record")
    evals = _evaluations(directory, notes)

    def curve(name: str) -> series.Curve:
        return curves.get(name, {})

    tokens = curve("train/tokens")
    times = [row["time"] for row in rows if isinstance(row.get("time"), (int, float))]
    predicted = _mapping(_mapping(info.get("plan")).get("predicted"))
    created = info.get("created") if isinstance(info.get("created"), (int, float)) else None
    began = created if created is not None else min(times, default=None)
    return Stage(
        path=str(directory),
        id=_text(info.get("id")),
        name=_text(info.get("name")) or directory.resolve().name,
        stage=_text(info.get("stage")) or "unknown",
        status=status,
        parent=_text(info.get("parent")),
        created=created,
        environment=_mapping(info.get("environment")),
        model=_mapping(info.get("model")) or _newest_model_config(directory),
        tokenizer=_tokenizer(info, config),
        config=config,
        steps=max((step for found in curves.values() for step in found), default=0),
        total_steps=info.get("total_steps") if isinstance(info.get("total_steps"), int) else None,
        tokens=int(max(tokens.values())) if tokens else None,
        train_seconds=series.integral(curve("train/step_seconds")),
        elapsed_seconds=max(times) - began if times and began is not None else None,
        tokens_per_second=series.median(curve("train/tokens_per_second")),
        mfu=series.median(curve("train/mfu")),
        memory_gib=max(curve("train/memory_gib").values(), default=None),
        predicted_tokens_per_second=_number(predicted.get("tokens_per_second")),
        predicted_memory_gib=_number(predicted.get("memory_gib")),
        loss=series.trend(curve("train/loss")),
        val_loss=series.trend(curve("val/loss")),
        val_bpb=series.trend(curve("val/bpb")),
        reward=series.trend(curve("rl/reward"), highest=True),
        experts=_experts(directory),
        series={name: series.series(found) for name, found in sorted(curves.items())},
        evals=evals,
        samples=_samples(directory),
        notes=notes,
    )


def runs_inside(path: Path) -> list[Path]:
    """Return the runs in a folder, oldest first; none where `path` is a run itself."""
    if _is_run(path) or not path.is_dir():
        return []
    runs = [child for child in sorted(path.iterdir()) if _is_run(child)]
    return sorted(runs, key=lambda run: _mapping_at(run / "run.json").get("created") or 0.0)


def chain_of(run: Path) -> tuple[list[Path], list[str]]:
    """Return the runs that led to `run`, itself last, by their `parent` links; and notes on what is amiss."""
    chain = [run]
    while (parent := _mapping_at(chain[0] / "run.json").get("parent")) is not None:
        name = chain[0].resolve().name
        found = _parent_run(str(parent), chain[0])
        if found is None:
            return chain, [f"{name} started from {parent}, which is no run: earlier stages are not shown"]
        if found.resolve() in [known.resolve() for known in chain]:
            return chain, [f"{name} is its own ancestor by way of {parent}: earlier stages are not shown"]
        chain.insert(0, found)
    return chain, []


def _parent_run(parent: str, child: Path) -> Path | None:
    """Return the run that holds checkpoint `parent`: where it says, or beside a child that was moved."""
    given = Path(parent)
    moved = [child.parent.joinpath(*given.parts[-n:]) for n in (2, 1) if len(given.parts) >= n]
    for candidate in (given, child / given, *moved):
        try:
            return find_run(candidate)
        except UserError:
            continue
    return None


def _is_run(path: Path) -> bool:
    return (path / "run.json").is_file() or (path / METRICS_FILE).is_file()


def _evaluations(directory: Path, notes: list[str]) -> list[Evaluation]:
    """Return the results in evals/step-*/<task>.json, by task and step."""
    found = []
    for path in sorted(directory.glob("evals/step-*/*.json")):
        values = _mapping_at(path)
        try:
            found.append(
                Evaluation(
                    task=values.get("task") or path.stem,
                    kind=values.get("kind"),
                    metric=values.get("metric") or "accuracy",
                    value=values["value"],
                    stderr=values.get("stderr"),
                    n=values.get("n"),
                    failed=values.get("failed") or 0,
                    baseline=values.get("baseline"),
                    error=values.get("error"),
                    step=int(path.parent.name.removeprefix("step-")),
                    settings=_mapping(values.get("settings")),
                )
            )
        except (KeyError, ValueError, ValidationError):
            notes.append(f"{path.relative_to(directory)} is not a result and was skipped")
    return sorted(found, key=lambda evaluation: (evaluation.task, evaluation.step))


def _samples(directory: Path) -> list[Sample]:
    """Return the samples of the last step that has any; long texts are cut, and say so."""
    rows = [row for row in read_jsonl(directory / "samples.jsonl")[0] if isinstance(row.get("step"), int)]
    last = max((row["step"] for row in rows), default=None)
    newest = [row for row in rows if row["step"] == last][-MAX_SAMPLES:]
    return [
        Sample(step=row["step"], prompt=_cut(row.get("prompt")), completion=_cut(row.get("completion")))
        for row in newest
    ]


def _experts(directory: Path) -> ExpertUse | None:
    """Return the mean use of experts over the last rows of experts.jsonl; None where there are none to read."""
    rows = {row["step"]: row for row in read_jsonl(directory / EXPERTS_FILE)[0] if isinstance(row.get("step"), int)}
    last = [rows[step] for step in sorted(rows)][-EXPERTS_ROWS:]
    try:
        newest = last[-1]
        same = [row for row in last if row["layers"] == newest["layers"]]
        by_layer = zip(*(row["shares"] for row in same), strict=True)
        sums = [[sum(shares) for shares in zip(*layer, strict=True)] for layer in by_layer]
        return ExpertUse(
            first_step=same[0]["step"],
            last_step=newest["step"],
            layers=newest["layers"],
            shares=[[round(total / len(same), 6) for total in layer] for layer in sums],
        )
    except (IndexError, KeyError, TypeError, ValueError):
        return None


def _cut(value: Any) -> str:
    text = "" if value is None else str(value)
    if len(text) <= MAX_SAMPLE_CHARACTERS:
        return text
    return f"{text[:MAX_SAMPLE_CHARACTERS]} [... {len(text) - MAX_SAMPLE_CHARACTERS} more characters]"


def _tokenizer(info: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Return what is known of the tokenizer: where it came from, its size and its fingerprint."""
    model = _mapping(info.get("model"))
    known = {
        "directory": config.get("tokenizer"),
        "vocab_size": model.get("vocab_size"),
        "fingerprint": model.get("tokenizer"),
    }
    return {name: value for name, value in known.items() if value is not None}


def _newest_model_config(directory: Path) -> dict[str, Any]:
    """Return what the newest checkpoint says of the model's shape: for a run whose run.json does not."""
    configs = sorted(directory.glob("step-*/config.json"))
    return _mapping_at(configs[-1]) if configs else {}


def _read(path: Path, parse: Callable[[str], Any], notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        notes.append(f"{path.name} is missing")
        return {}
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        values = None
    if not isinstance(values, dict):
        notes.append(f"{path.name} is damaged")
        return {}
    return values


def _parse_yaml(text: str) -> Any:
    """Read YAML as JSON could hold it: keys become strings, dates text."""
    return json.loads(json.dumps(yaml.safe_load(text), default=str))


def _mapping_at(path: Path) -> dict[str, Any]:
    return _read(path, json.loads, [])


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
