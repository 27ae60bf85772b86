"""A model on disk: a directory that Hugging Face's `from_pretrained` loads as it is.

`save_checkpoint` writes one; `load_checkpoint` reads ours, Hugging Face's, and nanochat's, from a run
directory (its newest good step), a step, a model directory or a hub id.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nanoworks.checkpoint.nanochat import import_nanochat, is_nanochat
from nanoworks.checkpoint.weights import Cut, Read, read_weights, write_weights
from nanoworks.common.errors import UserError, missing_extra, nearest
from nanoworks.common.files import atomic_directory, verify_directory
from nanoworks.config.model import ModelConfig
from nanoworks.models import Decoder, build_model, config_from_hf
from nanoworks.tokenizer import Tokenizer

log = logging.getLogger("nanoworks")

STATE = "state"
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """What `load_checkpoint` found. `metadata` is the `nanoworks` entry of config.json (run id, parent, ...)."""

    path: Path
    model: Decoder
    tokenizer: Tokenizer | None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> ModelConfig:
        return self.model.config


@contextmanager
def save_checkpoint(
    target: Path,
    model: Decoder,
    tokenizer: Tokenizer | None,
    *,
    metadata: Mapping[str, Any],
    read: Read | None = None,
) -> Iterator[Path]:
    """Write a model directory at `target` in one atomic step.

    `read` is that of `write_weights`. Yields the scratch directory, so that the caller may add its own files
    (`state/`) to the same step.
    """
    with atomic_directory(target) as scratch:
        write_model(scratch, model, tokenizer, metadata=metadata, read=read)
        yield scratch


def write_model(
    directory: Path,
    model: Decoder,
    tokenizer: Tokenizer | None,
    *,
    metadata: Mapping[str, Any],
    read: Read | None = None,
) -> None:
    """Write what `from_pretrained` wants into `directory`."""
    config = model.config
    if tokenizer is not None:
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        # What a foreign config.json says stays: it may name more than one end.
        config = config.model_copy(update={k: v for k, v in ids.items() if getattr(config, k) is None})
    written = config.to_hf()
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    written["torch_dtype" if "torch_dtype" in written else "dtype"] = dtype  # the name in transformers 4
    if metadata:
        written["nanoworks"] = dict(metadata)
    write_sorted(directory / "config.json", written)
    write_weights(model, directory, read=read)
    if tokenizer is not None:
        tokenizer.save(directory)
        write_sorted(
            directory / "generation_config.json",
            {
                "bos_token_id": tokenizer.bos_id,
                "eos_token_id": list(tokenizer.stop_ids),
                "do_sample": True,
            },
        )


def load_checkpoint(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    cut: Cut | None = None,
    mapped: bool = False,
) -> Checkpoint:
    """Load the model and tokenizer at `path` (see the module's docstring); `dtype` None keeps the file's, `cut` leaves
    a share of the model. `mapped`, for those who do not train: weights that need no change stay in the files, which
    must not be written to from now on.

    Raises:
        UserError: nothing there, damaged files (named), an unknown family, or tensors that do not fit.
    """
    directory = locate(path)
    if is_nanochat(directory):
        model, tokenizer, meta = import_nanochat(directory, device=device, dtype=dtype)
        if cut is not None:
            cut(model)
        return Checkpoint(directory, model.eval(), tokenizer, {"nanochat": meta})
    with ThreadPoolExecutor(1) as pool:  # hashing, which takes as long, runs beside
        verified = pool.submit(verify_directory, directory)
        try:
            raw = read_json(directory / "config.json")
            with torch.device("meta"):
                model = build_model(config_from_hf(raw))
            read_weights(model, directory, device=device, dtype=dtype, cut=cut, mapped=mapped)
        finally:
            verified.result()  # damage is named first, whatever it led to
    tokenizer = Tokenizer.load(directory) if (directory / "tokenizer.json").is_file() else None
    check_vocabulary(model.config, tokenizer)
    return Checkpoint(directory, model.eval(), tokenizer, raw.get("nanoworks", {}))


def locate(path: str | Path) -> Path:
    """Resolve a run to its newest good step; a step, a model or nanochat directory to itself; a hub id to its
    download."""
    directory = Path(path)
    if not directory.is_dir():
        return fetch(str(path))
    if (directory / "config.json").is_file() or is_nanochat(directory):
        return directory
    step = latest_step(directory)
    if step is None:
        raise UserError(f"{directory} holds no checkpoint: neither step-* directories, nor config.json, nor model_*.pt")
    return step


def steps_of(run: Path) -> list[Path]:
    """The step directories of a run, oldest first."""
    found = [(int(m.group(1)), p) for p in run.glob("step-*") if (m := _STEP.fullmatch(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found)]


def latest_step(run: Path) -> Path | None:
    """The newest step whose files are all as they were written; damaged ones are named in the log and passed over."""
    for step in reversed(steps_of(run)):
        try:
            verify_directory(step)
            return step
        except UserError as error:
            log.warning("%s; trying the step before", error)
    return None


def check_vocabulary(config: ModelConfig, tokenizer: Tokenizer | None) -> None:
    """UserError when the tokenizer knows ids that the model has no embedding for."""
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model only {config.vocab_size}: "
            "they do not belong together; give the tokenizer that the model was trained with"
        )


def fetch(name: str, *, weights: bool = True) -> Path:
    """Download what a model needs from the hub, or find it in the cache: safetensors, JSON and tokenizer files.

    Raises:
        UserError: no hub id, no such repository, no connection, or pickled weights only.
    """
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"{name} is neither a directory nor a hub id (owner/name){_near(Path(name))}")
    try:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise missing_extra("huggingface_hub", "hub") from None
    patterns = ["*.json", "*.jinja", "*.model", "*.txt", "LICENSE*"]
    try:
        # Folders hold the same weights in other layouts.
        wanted = [*patterns, "*.safetensors"] if weights else patterns
        directory = Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*"]))
        if weights and not any(directory.glob("*.safetensors")):
            pickled = [f for f in HfApi().list_repo_files(name) if f.endswith((".bin", ".pth", ".pt"))]
            if pickled:
                raise UserError(
                    f"{name} has pickled weights only ({pickled[0]}), which can run code when read; take a revision or "
                    "a copy of it in safetensors"
                )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{name} is no directory here{_near(Path(name))}, and could not be fetched from the hub "
            f"({type(error).__name__}); without a connection give a local directory (config.json, *.safetensors, "
            "tokenizer.json), or set HF_HOME to a cache that holds it"
        ) from None
    return directory


def _near(path: Path) -> str:
    """What the first part of `path` that does not exist may have meant, in parentheses; or nothing."""
    while not path.parent.is_dir():
        path = path.parent
    return nearest(path.name, [entry.name for entry in path.parent.iterdir() if entry.is_dir()])


def read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} is missing") from None
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from None


def write_sorted(file: Path, value: Mapping[str, Any]) -> None:
    """Write JSON as transformers does: keys sorted, ASCII, a newline at the end."""
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
