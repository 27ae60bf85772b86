"""nanochat's own checkpoints: a folder of `model_NNNNNN.pt` and `meta_NNNNNN.json`, in and out.

A file says nothing of the architecture it was trained with; the names of its tensors tell the era. Only
eras whose arithmetic was checked against the original are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanoworks.checkpoint.keymap import KeyMap, Place
from nanoworks.checkpoint.weights import fill
from nanoworks.common.errors import UserError
from nanoworks.common.files import atomic_directory
from nanoworks.config.model import ModelConfig
from nanoworks.models import ARCHITECTURES, Decoder, build_model, config_from_dict
from nanoworks.tokenizer import Tokenizer
from nanoworks.tokenizer.nanochat import export_nanochat_tokenizer, import_nanochat_tokenizer

_MODEL_FILE = re.compile(r"model_(\d+)\.pt")


class Era(NamedTuple):
    """A span of commits with one architecture, and the family here that computes the same, if there is one."""

    name: str
    family: str | None = None


def is_nanochat(directory: Path) -> bool:
    return any(_MODEL_FILE.fullmatch(p.name) for p in directory.glob("model_*.pt"))


def era_of(state: Mapping[str, Tensor]) -> Era:
    """Tell the architecture era of a state dict by the names and shapes of its tensors."""

    def has(part: str) -> bool:
        return any(part in name for name in state)

    if not has("resid_lambdas"):
        return Era("of 2025 (commits up to 885a4f2, before resid_lambdas)", "nanochat")
    if has("smear_gate"):
        return Era("from 2026-03-14 on (commits a825e63 to 92d63d4: smear, backout)", "nanochat_2026")
    if has("bigram_embed"):
        return Era("of 2026-01-25 to 2026-01-28 (commits 59e36cc to 74554be: bigram embedding)")
    gates = [tensor.size(-1) for name, tensor in state.items() if "ve_gate" in name]
    if not gates:
        return Era("of 2026-01-11 to 2026-01-16 (from commit aa530cd: residual lambdas)")
    if gates[0] == 12:
        return Era("of 2026-03-09 to 2026-03-14 (from commit 6ed7d1d: value embeddings with gates of 12 channels)")
    return Era("of 2026-01-16 to 2026-03-09 (from commit e85db6b: value embeddings with gates of 32 channels)")


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
    era = era_of(state)
    if era.family is None:
        raise UserError(
            f"{directory} was written by the nanochat {era.name}; its architecture lasted for weeks and is not one of "
            "those read here, which are nanochat's of 2025 (up to commit 885a4f2) and from 2026-03-14 on (a825e63 to "
            "92d63d4); train it again, or go on with it in nanochat at that commit"
        )
    with torch.device("meta"):
        model = build_model(_config(era.family, meta["model_config"]))
    keymap = KeyMap(ARCHITECTURES.get(era.family).keymaps["nanochat"])
    if era.family == "nanochat":
        _drop_padding(state, model.config.vocab_size)
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
    c = model.config
    architecture = ARCHITECTURES.get(c.model_type)
    if "nanochat" not in architecture.keymaps:
        raise UserError(f"only the nanochat families export to nanochat's format, this is a {c.model_type}")
    own = c.model_dump()
    model_config: dict[str, Any] = {
        "sequence_len": c.max_position_embeddings,
        "vocab_size": c.vocab_size,
        "n_layer": c.num_hidden_layers,
        "n_head": c.num_attention_heads,
        "n_kv_head": c.num_key_value_heads,
        "n_embd": c.hidden_size,
    }
    if "window_pattern" in own:
        model_config["window_pattern"] = own["window_pattern"]
    fixed = _config(c.model_type, model_config).model_dump()
    for key in sorted(own.keys() - {"bos_token_id", "eos_token_id"}):
        if own[key] != fixed[key]:
            raise UserError(
                f"nanochat's format has no place for {key}, which is {own[key]} in this model; nanochat takes it to "
                f"be {fixed[key]}. Export to Hugging Face's layout instead (--to hf)"
            )
    keymap = KeyMap(architecture.keymaps["nanochat"])
    state = {keymap.to_foreign(name): p.detach().cpu() for name, p in model.named_parameters()}
    content = {**(meta or {}), "step": step, "model_config": model_config}
    with atomic_directory(target) as scratch:
        torch.save(state, scratch / f"model_{step:06d}.pt")
        (scratch / f"meta_{step:06d}.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
        if tokenizer is not None:
            export_nanochat_tokenizer(tokenizer, scratch)


def _config(family: str, theirs: Mapping[str, Any]) -> ModelConfig:
    """The configuration that the `model_config` of a meta file stands for; the rest is fixed by the era."""
    values = {
        "model_type": family,
        "vocab_size": theirs["vocab_size"],
        "hidden_size": theirs["n_embd"],
        "num_hidden_layers": theirs["n_layer"],
        "num_attention_heads": theirs["n_head"],
        "num_key_value_heads": theirs["n_kv_head"],
        "max_position_embeddings": theirs["sequence_len"],
    }
    if "window_pattern" in theirs:
        values["window_pattern"] = theirs["window_pattern"].upper()
    return config_from_dict(values)


def _drop_padding(state: dict[str, Tensor], vocab_size: int) -> None:
    """From December 2025 on (commit f1bf69d) the tables of tokens have rows up to a multiple of 64, of no effect."""
    for name in ("transformer.wte.weight", "lm_head.weight"):
        if name in state:
            state[name] = state[name][:vocab_size]


def _read_pt(file: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different class for each kind of damage
        raise UserError(f"{file} is truncated, altered or no plain state dict: {error}") from None
    return {name.removeprefix("_orig_mod."): tensor for name, tensor in state.items()}


def _named(state: Mapping[str, Tensor], keymap: KeyMap) -> Iterator[tuple[Place, str, Tensor]]:
    for foreign, tensor in state.items():
        yield keymap.to_ours(foreign) or Place(foreign, None), foreign, tensor


def _find_tokenizer(directory: Path) -> Tokenizer | None:
    for folder in (directory, directory.parent.parent / "tokenizer"):
        if (folder / "tokenizer.pkl").is_file():
            return import_nanochat_tokenizer(folder)
        if (folder / "tokenizer.json").is_file():
            return Tokenizer.load(folder)
    return None
