"""Weights & Biases, online or offline (`mode: offline`, uploaded later with `wandb sync`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

from nanoworks.common.errors import missing_extra
from nanoworks.config.base import Frozen
from nanoworks.trackers.base import TRACKERS, TrackedRun


@TRACKERS.register("wandb")
class WandbTracker:
    class Options(Frozen):
        project: str = "nanoworks"
        entity: str | None = Field(default=None, description="team or user; null: the account's own")
        mode: Literal["online", "offline"] = "online"
        tags: tuple[str, ...] = ()
        upload_artifacts: bool = Field(default=False, description="send files, not only figures")
        start_timeout: float = Field(default=60.0, gt=0, description="seconds to wait for the server")
        finish_timeout: float = Field(default=120.0, gt=0, description="seconds to wait for the last upload")

    def __init__(self, options: Options, run: TrackedRun) -> None:
        try:
            import wandb
        except ImportError:
            raise missing_extra("wandb", "wandb") from None
        self._wandb = wandb
        self._upload = options.upload_artifacts
        self._run = wandb.init(
            project=options.project,
            entity=options.entity,
            mode=options.mode,
            tags=options.tags,
            id=run.id,
            resume="allow",
            name=run.name,
            group=run.stage,
            config=dict(run.config),
            dir=str(run.directory),
            settings=wandb.Settings(
                console="off",  # the terminal belongs to the console tracker
                init_timeout=options.start_timeout,
                finish_timeout=options.finish_timeout,
            ),
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def artifact(self, path: Path) -> None:
        if not self._upload:
            return
        name = re.sub(r"[^\w.-]", "-", f"{self._run.id}-{path.name}")
        artifact = self._wandb.Artifact(name, type="checkpoint" if path.is_dir() else "file")
        if path.is_dir():
            artifact.add_dir(str(path))
        else:
            artifact.add_file(str(path))
        self._run.log_artifact(artifact)

    def close(self) -> None:
        self._run.finish()
