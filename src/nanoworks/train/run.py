"""A run on disk: its directory, its identity, its checkpoints and which of them to keep."""

from __future__ import annotations

import json
import logging
import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanoworks.checkpoint import latest_step, steps_of
from nanoworks.common.environment import environment_info
from nanoworks.common.errors import UserError
from nanoworks.common.files import atomic_write, verify_directory, write_json
from nanoworks.config import Recipe, to_yaml

log = logging.getLogger("nanoworks")


class RunDirectory:
    """`<root>/<name>/` with config.yaml, run.json, metrics.jsonl, samples.jsonl, evals/ and step-*/."""

    def __init__(self, recipe: Recipe) -> None:
        self.path = Path(recipe.run.root) / recipe.run.name
        self.recipe = recipe
        self.info: dict[str, Any] = {}

    def find(self, *, resume: bool) -> Path | None:
        """Return the newest good step of an existing run, or None where training has to begin.

        Raises:
            UserError: the run exists and `resume` is false, or it has steps and all are damaged (the newest's damage is
                named).
        """
        if not (self.path / "run.json").is_file():
            return None
        if not resume:
            raise UserError(f"{self.path} exists already; add --resume to go on with it, or choose another run.name")
        self.info = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        found = latest_step(self.path)
        if found is None and (steps := steps_of(self.path)):
            try:
                verify_directory(steps[-1])
            except UserError as error:
                raise UserError(
                    f"{self.path} has no step that is whole: {error}. Put back what is missing, or choose another "
                    "run.name to begin again"
                ) from None
        return found

    def create(self, *, parent: str | None) -> None:
        """Write config.yaml and run.json, unless the run is one that goes on."""
        self.path.mkdir(parents=True, exist_ok=True)
        if self.info:
            return
        self.info = {
            "id": uuid.uuid4().hex[:12],
            "name": self.recipe.run.name,
            "stage": self.recipe.stage.name,
            "parent": parent,
            "created": time.time(),
            "status": "running",
            "environment": environment_info(),
        }
        atomic_write(self.path / "config.yaml", to_yaml(self.recipe))
        self.update()

    def update(self, **info: Any) -> None:
        """Add to run.json."""
        self.info.update(info)
        write_json(self.path / "run.json", self.info)

    def step_path(self, step: int) -> Path:
        return self.path / f"step-{step:06d}"

    def add_sample(self, sample: Mapping[str, Any]) -> None:
        with (self.path / "samples.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(sample, ensure_ascii=False) + "\n")

    def prune(self, *, keep_last: int, best: int | None) -> None:
        """Delete old steps beyond the newest `keep_last`, sparing step `best`."""
        for path in steps_of(self.path)[:-keep_last]:
            if best is None or path != self.step_path(best):
                shutil.rmtree(path, ignore_errors=True)
        for path in self.path.glob(".step-*.partial"):  # what a run that was killed left half written
            shutil.rmtree(path, ignore_errors=True)

    @property
    def finished(self) -> bool:
        return self.info.get("status") == "finished"
