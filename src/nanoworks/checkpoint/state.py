"""Training state beside a checkpoint: tensors as safetensors, everything else as JSON. No pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from nanoworks.common.errors import UserError


def save_state(directory: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Write `tensors.safetensors` and `state.json` into `directory`, which is created."""
    directory.mkdir(parents=True)
    save_file(
        {name: t.detach().cpu().contiguous() for name, t in tensors.items()},
        directory / "tensors.safetensors",
    )
    (directory / "state.json").write_text(json.dumps(values, indent=1), encoding="utf-8")


def load_state(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what `save_state` wrote."""
    if not (directory / "state.json").is_file():
        raise UserError(
            f"{directory.parent} has no {directory.name}/: it holds a model but no training state, so a run cannot "
            "resume from it; start a new run with init_from instead"
        )
    values = json.loads((directory / "state.json").read_text(encoding="utf-8"))
    return load_file(directory / "tensors.safetensors"), values
