"""nanochat's own checkpoints: a folder of `model_NNNNNN.pt` and `meta_NNNNNN.json`, in and out.

A file says nothing of the architecture it was trained with; the names of its tensors tell the era. Only
eras whose arithmetic was checked against the original are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanoworks.checkpoint.keymap import KeyMap
from nanoworks.checkpoint.weights import fill
from nanoworks.common.errors import UserError
from nanoworks.common.files import atomic_directory
from nanoworks.models import ARCHITECTURES, Decoder, build_model, config_from_dict
from nanoworks.tokenizer import Tokenizer
from nanoworks.tokenizer.nanochat import export_nanochat_tokenizer, import_nanochat_tokenizer

_MODEL_FILE = re.compile(r"model_(\d+)\.pt")


def is_nanochat(directory: Path) -> bool:
    return any(_MODEL_FILE.fullmatch(p.name) for p in directory.glob("model_*.pt"))


def era_of(names: set[str]) -> str:
    """Name the architecture era of a state dict by its tensor names."""
    if not any("resid_lambdas" in n for n in names):
        return "2025-11"
    if any("smear_gate" in n for n in names):
        return "2026-03 (commits a825e63 to 92d63d4: smear, backout)"
    if any("bigram_embed" in n for n in names):
        return "2026-01-25 (commits 59e36cc to 74554be: bigram embedding)"
    if any("ve_gate" in n for n in names):
        return "2026-01-16 to 2026-03-09 (commits e85db6b to 6ed7d1d: value embeddings)"
    return "2026-01-11 (commit aa530cd: residual lambdas)"


def import_nanochat(
    directory: Path, *, step: int | None = None, device: str | torch.device, dtype: torch.dtype | None
) -> tuple[Decoder, Tokenizer | None, dict[str, Any]]:
    """Return (model, tokenizer or None, nanochat's meta) of the given or the newest step in `directory`.

    The tokenizer is looked for in the folder itself and in nanochat's base directory two levels up.
    """
    steps = sorted(int(m.group(1)) for p in directory.iterdir() if (m := _MODEL_FILE.fullmatch(p.name)))
    if step is None:
        step = steps[-1]
    elif step not in steps:
        raise UserError(f"{directory} has no step {step}; it has {', '.join(map(str, steps))}")
    meta_file = directory / f"meta_{step:06d}.json"
    if not meta_file.is_file():
        raise UserError(f"{meta_file} is missing; a nanochat checkpoint is a model_*.pt with its meta_*.json")
    meta = json.loads(meta_file.read_text(encoding="utf-8"))
    state = _read_pt(directory / f"model_{step:06d}.pt")
    era = era_of(set(state))
    if era != "2025-11":
        raise UserError(
            f"{directory} is of nanochat's era {era}; this version of nanoworks reads the era of November 2025 "
            "(commits up to 885a4f2, before resid_lambdas)"
        )
    model = _build(meta["model_config"])
    keymap = KeyMap(ARCHITECTURES.get("nanochat").keymaps["nanochat"])
    # The embedding is bfloat16 in files from a GPU; float32 is our master dtype.
    fill(model, _named(state, keymap), str(directory), device=device, dtype=dtype or torch.float32)
    return model, _find_tokenizer(directory), meta


def export_nanochat(
    model: Decoder,
    tokenizer: Tokenizer | None,
    target: Path,
    *,
    step: int = 0,
    meta: Mapping[str, Any] | None = None,
) -> None:
    """Write `target/model_*.pt`, `target/meta_*.json` and, beside them, nanochat's tokenizer files."""
    if model.config.model_type != "nanochat":
        raise UserError(f"only the nanochat family exports to nanochat's format, this is a {model.config.model_type}")
    c = model.config
    keymap = KeyMap(ARCHITECTURES.get("nanochat").keymaps["nanochat"])
    state = {keymap.to_foreign(name): p.detach().cpu().clone() for name, p in model.named_parameters()}
    content = {
        **(meta or {}),
        "step": step,
        "model_config": {
            "sequence_len": c.max_position_embeddings,
            "vocab_size": c.vocab_size,
            "n_layer": c.num_hidden_layers,
            "n_head": c.num_attention_heads,
            "n_kv_head": c.num_key_value_heads,
            "n_embd": c.hidden_size,
        },
    }
    with atomic_directory(target) as scratch:
        torch.save(state, scratch / f"model_{step:06d}.pt")
        (scratch / f"meta_{step:06d}.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
        if tokenizer is not None:
            export_nanochat_tokenizer(tokenizer, scratch)


def _build(config: Mapping[str, Any]) -> Decoder:
    with torch.device("meta"):
        return build_model(
            config_from_dict(
                {
                    "model_type": "nanochat",
                    "vocab_size": config["vocab_size"],
                    "hidden_size": config["n_embd"],
                    "num_hidden_layers": config["n_layer"],
                    "num_attention_heads": config["n_head"],
                    "num_key_value_heads": config["n_kv_head"],
                    "max_position_embeddings": config["sequence_len"],
                }
            )
        )


def _read_pt(file: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different class for each kind of damage
        raise UserError(f"{file} is truncated, altered or no plain state dict: {error}") from None
    return {name.removeprefix("_orig_mod."): tensor for name, tensor in state.items()}


def _named(state: Mapping[str, Tensor], keymap: KeyMap) -> Iterator[tuple[str, str, Tensor]]:
    for foreign, tensor in state.items():
        yield keymap.to_ours(foreign) or foreign, foreign, tensor


def _find_tokenizer(directory: Path) -> Tokenizer | None:
    for folder in (directory, directory.parent.parent / "tokenizer"):
        if (folder / "tokenizer.pkl").is_file():
            return import_nanochat_tokenizer(folder)
        if (folder / "tokenizer.json").is_file():
            return Tokenizer.load(folder)
    return None
