"""Reads the evaluation bundle of CORE: a directory, a .zip of it, or the http(s) address of the .zip.

eval_bundle/core.yaml              the tasks: label, dataset_uri, icl_task_type, num_fewshot, ...
eval_bundle/eval_meta_data.csv     "Eval Task" and "Random baseline" (per cent)
eval_bundle/eval_data/**/*.jsonl   the items
"""

from __future__ import annotations

import csv
import io
import json
import random
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from nanoworks.common.errors import UserError, nearest
from nanoworks.common.validation import explain
from nanoworks.config.base import Frozen
from nanoworks.data.download import cache_dir, fetch

OFFICIAL_BUNDLE = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
"""The bundle that nanochat uses, 26 MB: 22 tasks chosen by DataComp-LM (https://arxiv.org/abs/2406.11794)."""

Item = dict[str, Any]

_FIELDS = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}
_SHUFFLE_SEED = 1337  # nanochat's, so that a limited run sees the same items


class _TaskEntry(Frozen, extra="ignore"):
    """What we use of an entry of `icl_tasks`."""

    label: str
    dataset_uri: str
    icl_task_type: Literal["multiple_choice", "schema", "language_modeling"]
    num_fewshot: list[int] = Field(min_length=1)
    continuation_delimiter: str = " "


@dataclass(frozen=True)
class CoreTask:
    label: str
    kind: Literal["multiple_choice", "schema", "language_modeling"]
    num_fewshot: int
    delimiter: str
    """Stands between a context and its continuation."""
    baseline: float
    """What guessing gives, a fraction."""
    place: Path | zipfile.Path

    def items(self) -> list[Item]:
        """Return the items, shuffled; UserError names the line of one that lacks a field."""
        items = []
        for number, line in enumerate(_read(self.place).splitlines(), start=1):
            if not line.strip():
                continue
            try:
                item = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{self.place}:{number}: not JSON: {error.msg}") from None
            for name in _FIELDS[self.kind]:
                if name not in item:
                    raise UserError(f"{self.place}:{number}: no field {name!r}{nearest(name, item)}")
            items.append(item)
        if not items:
            raise UserError(f"{self.place}: no items in it")
        random.Random(_SHUFFLE_SEED).shuffle(items)
        return items


def load_bundle(path: str) -> list[CoreTask]:
    """Return the tasks of the bundle at `path`, in the order of core.yaml."""
    root = _open(path)
    baselines = _baselines(root / "eval_meta_data.csv")
    config = root / "core.yaml"
    try:
        entries = yaml.safe_load(_read(config))["icl_tasks"]
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{config}: no list icl_tasks to be read ({error})") from None
    tasks = []
    for i, values in enumerate(entries):
        try:
            entry = _TaskEntry(**values)
        except ValidationError as error:
            raise UserError(explain(error, _TaskEntry, prefix=f"{config}: icl_tasks.{i}")) from None
        if entry.label not in baselines:
            raise UserError(f"{root / 'eval_meta_data.csv'}: no random baseline for {entry.label!r}")
        tasks.append(
            CoreTask(
                label=entry.label,
                kind=entry.icl_task_type,
                num_fewshot=entry.num_fewshot[0],
                delimiter=entry.continuation_delimiter,
                baseline=baselines[entry.label],
                place=root / "eval_data" / entry.dataset_uri,
            )
        )
    return tasks


def _open(path: str) -> Path | zipfile.Path:
    """Return the directory, real or inside the .zip, that holds core.yaml."""
    local = Path(path).expanduser()
    if path.startswith(("http://", "https://")):
        local = cache_dir() / "eval_bundle.zip"
        try:
            fetch({local: path})
        except UserError as error:
            raise UserError(f"{error}; download the bundle elsewhere and give it with --path core=FILE") from None
    if not local.exists():
        raise UserError(f"{local}: no such file or directory; give the CORE bundle (a directory or its .zip)")
    try:
        root = local if local.is_dir() else zipfile.Path(local)
    except zipfile.BadZipFile:
        raise UserError(f"{local}: not a .zip file, or a damaged one") from None
    for place in (root, root / "eval_bundle"):
        if (place / "core.yaml").is_file():
            return place
    raise UserError(f"{local}: no core.yaml in it or in its eval_bundle/")


def _baselines(place: Path | zipfile.Path) -> dict[str, float]:
    try:
        rows = csv.DictReader(io.StringIO(_read(place)))
        return {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in rows}
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{place}: needs the columns Eval Task and Random baseline, a number ({error})") from None


def _read(place: Path | zipfile.Path) -> str:
    try:
        return place.read_text(encoding="utf-8")
    except (OSError, KeyError) as error:
        raise UserError(f"{place}: cannot be read ({error})") from None
