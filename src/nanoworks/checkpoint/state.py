"""Training state beside a checkpoint: tensors as safetensors, everything else as JSON. No pickle.

One process writes `tensors.safetensors`; of several each may write a shard of its own (`sharded.save_parts`). Both are
read by the same code, and neither says anything of how many ranks there were.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nanoworks.checkpoint.safetensors_file import Layout, Spec, write_file
from nanoworks.checkpoint.sharded import Shards
from nanoworks.common.errors import UserError


def save_state(
    directory: Path,
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
    *,
    read: Callable[[str], Tensor] | None = None,
) -> None:
    """Write `tensors.safetensors` and `state.json` into `directory`, which is created.

    `read` gives a tensor's value where `tensors` has its shape only; it is called for each in their order, and only one
    result is held.
    """
    directory.mkdir(parents=True)
    layout = Layout.of({name: Spec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}, {})
    whole = ((name, (read(name) if read else tensor).detach()) for name, tensor in tensors.items())
    write_file(directory / "tensors.safetensors", layout, whole)
    save_values(directory, values)


def save_values(directory: Path, values: Mapping[str, Any]) -> None:
    """Write `state.json`, all of a state that is no tensor."""
    (directory / "state.json").write_text(json.dumps(values, indent=1), encoding="utf-8")


def load_state(directory: Path) -> tuple[Shards, dict[str, Any]]:
    """Return what was saved: the tensors, each read when it is asked for, and the rest."""
    if not (directory / "state.json").is_file():
        raise UserError(
            f"{directory.parent} has no {directory.name}/: it holds a model but no training state, so a run cannot "
            "resume from it; start a new run with init_from instead"
        )
    values = json.loads((directory / "state.json").read_text(encoding="utf-8"))
    return Shards(directory), values
