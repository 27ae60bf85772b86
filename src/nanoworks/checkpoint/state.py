"""Training state beside a checkpoint: tensors as safetensors, everything else as JSON. No pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from nanoworks.checkpoint.safetensors_file import Layout, Spec, write_file
from nanoworks.checkpoint.weights import Full, as_it_is
from nanoworks.common.errors import UserError


def save_state(
    directory: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any], *, full: Full = as_it_is
) -> None:
    """Write `tensors.safetensors` and `state.json` into `directory`, which is created.

    `full` is called for each tensor in their order, and only one result is held.
    """
    directory.mkdir(parents=True)
    layout = Layout.of({name: Spec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}, {})
    whole = ((name, full(tensor.detach())) for name, tensor in tensors.items())
    write_file(directory / "tensors.safetensors", layout, whole)
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
