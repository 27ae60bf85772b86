"""Medusa heads on disk: `medusa/` beside the model they were trained on, with the mark of that model.

`medusa/medusa.json` holds their shape, how often each was right, and the backbone's fingerprint;
`medusa/medusa.safetensors` the weights. They are read with any copy of the same backbone, in any dtype.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanoworks.checkpoint.checkpoint import locate, read_json, write_sorted
from nanoworks.common.errors import UserError
from nanoworks.models import Decoder
from nanoworks.nn.medusa import MedusaHeads

FOLDER = "medusa"
_JSON, _WEIGHTS = "medusa.json", "medusa.safetensors"
_VALUES = 4096
"""Values of each tensor that the fingerprint looks at, evenly spaced."""

Ranks = list[list[float]]
"""By head: how often its likeliest guess was right, its second, and so on."""


@dataclass(frozen=True)
class SavedHeads:
    heads: MedusaHeads
    ranks: Ranks
    """As measured on the validation data of the training run; empty when nothing was measured."""


@torch.no_grad()
def fingerprint(model: Decoder) -> str:
    """A mark of the model's weights that does not depend on the dtype they are held in (float32 or bfloat16).

    To be taken before weights are quantized or fused. It reads a few thousand values of each tensor, so it is quick at
    any size and still changes with any training.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        flat = parameter.detach().flatten()
        step = max(1, flat.numel() // _VALUES)
        digest.update(flat[::step].to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def save_heads(directory: Path, heads: MedusaHeads, model: Decoder, *, ranks: Ranks) -> None:
    """Write `directory/medusa/`; `model` is the backbone."""
    folder = directory / FOLDER
    folder.mkdir(parents=True)
    write_sorted(
        folder / _JSON,
        {
            "backbone": {"fingerprint": fingerprint(model), "model_type": model.config.model_type},
            "hidden_size": model.config.hidden_size,
            "num_heads": heads.num_heads,
            "num_layers": heads.num_layers,
            "own_unembedding": len(heads.lm_heads) > 0,
            "ranks": ranks,
            "vocab_size": model.config.vocab_size,
        },
    )
    save_file({name: p.detach().cpu().contiguous() for name, p in heads.named_parameters()}, folder / _WEIGHTS)


def load_heads(path: str | Path, model: Decoder) -> SavedHeads:
    """Read the heads at `path` (their folder, or the run or step that holds it) for the backbone `model`.

    They take the device and dtype of `model`, whose weights must not be quantized yet.

    Raises:
        UserError: nothing there, damaged, or trained on another backbone.
    """
    folder = _find(Path(path))
    info = read_json(folder / _JSON)
    try:
        backbone, ranks = info["backbone"], info["ranks"]
        heads = MedusaHeads(
            info["hidden_size"],
            info["num_heads"],
            num_layers=info["num_layers"],
            vocab_size=info["vocab_size"] if info["own_unembedding"] else None,
        )
        state = load_file(folder / _WEIGHTS)
        expected: dict[str, Any] = {name: p.shape for name, p in heads.named_parameters()}
        if {name: t.shape for name, t in state.items()} != expected:
            raise ValueError("other tensors than medusa.json describes")
    except (KeyError, TypeError, ValueError, OSError, SafetensorError) as error:
        raise UserError(f"{folder} is damaged ({error}); train the heads again or copy the folder again") from None
    own = fingerprint(model)
    if backbone["fingerprint"] != own:
        raise UserError(
            f"the Medusa heads in {folder} were trained on another model ({backbone['model_type']}, "
            f"{backbone['fingerprint'][:8]}) than this one ({model.config.model_type}, {own[:8]}); serve the run that "
            "holds the heads, or train heads for this model (recipes/medusa)"
        )
    heads.load_state_dict(state)
    weight = model.embed_tokens.weight
    return SavedHeads(heads.to(device=weight.device, dtype=weight.dtype).eval(), ranks)


def _find(path: Path) -> Path:
    if (path / _JSON).is_file():
        return path
    folder = locate(path) / FOLDER
    if not (folder / _JSON).is_file():
        raise UserError(
            f"{path} holds no Medusa heads (no {FOLDER}/{_JSON}); train some with `nanoworks train medusa/demo "
            f"init_from={path}`, or choose another way to speculate"
        )
    return folder
