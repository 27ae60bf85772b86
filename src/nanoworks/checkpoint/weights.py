"""Weights between a model and safetensors files in Hugging Face's layout, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nanoworks.checkpoint.keymap import KeyMap
from nanoworks.common.errors import UserError
from nanoworks.models import ARCHITECTURES, Decoder

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000


def write_weights(model: Decoder, directory: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write `model.safetensors`, or numbered shards with an index when it would exceed `max_shard_bytes`."""
    keymap = KeyMap(ARCHITECTURES.get(model.config.model_type).keymaps["hf"])
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in owned_parameters(model).items():
        foreign = keymap.to_foreign(name)
        assert foreign is not None, f"the key map of {model.config.model_type} lacks {name}"
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][foreign] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], directory / SINGLE, metadata={"format": "pt"})
        return
    weight_map, total = {}, 0
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        total += sum(t.nbytes for t in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def read_weights(model: Decoder, directory: Path, *, device: str | torch.device, dtype: torch.dtype | None) -> None:
    """Fill `model` (which may be on the meta device) from the safetensors files of `directory`.

    `dtype` None keeps what the files hold. UserError names a missing, unknown or wrongly shaped tensor.
    """
    keymap = KeyMap(ARCHITECTURES.get(model.config.model_type).keymaps["hf"])
    fill(model, _translated(directory, keymap), str(directory), device=device, dtype=dtype)


def fill(
    model: Decoder,
    tensors: Iterator[tuple[str, str, Tensor]],
    source: str,
    *,
    device: str | torch.device,
    dtype: torch.dtype | None,
) -> None:
    """Assign (our name, their name, tensor) to the parameters of `model`, which must all be met."""
    expected = owned_parameters(model)
    state: dict[str, Tensor] = {}
    for name, foreign, tensor in tensors:
        if name not in expected:
            if name == "head.lm_head.weight" and model.config.tie_word_embeddings:
                continue  # some writers store a tied weight twice
            raise UserError(f"{source}: tensor {foreign} has no place in a {model.config.model_type} of this config")
        shape = tuple(expected[name].shape)
        if tensor.shape != shape:
            raise UserError(f"{source}: tensor {foreign} is {tuple(tensor.shape)}, the config asks for {shape}")
        state[name] = tensor.to(device=device, dtype=dtype or tensor.dtype)
    missing = sorted(expected.keys() - state.keys())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{source}: no tensor for {missing[0]}{more}; is this a {model.config.model_type}?")
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()


def owned_parameters(model: Decoder) -> Mapping[str, Tensor]:
    """Every parameter once: a tied head is the embedding's."""
    return dict(model.named_parameters())


def _translated(directory: Path, keymap: KeyMap) -> Iterator[tuple[str, str, Tensor]]:
    for file in _files(directory):
        try:
            with safe_open(file, framework="pt") as tensors:
                for foreign in tensors.keys():  # noqa: SIM118 (not a mapping)
                    if foreign.endswith("rotary_emb.inv_freq"):
                        continue  # derived from the config
                    name = keymap.to_ours(foreign)
                    yield name or foreign, foreign, tensors.get_tensor(foreign)
        except SafetensorError as error:
            raise UserError(f"{file} is truncated or altered: {error}") from None


def _files(directory: Path) -> list[Path]:
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if (directory / INDEX).is_file():
        weight_map = json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = [directory / name for name in sorted(set(weight_map.values()))]
        for file in files:
            if not file.is_file():
                raise UserError(f"{file} is missing, though {INDEX} names it")
        return files
    if list(directory.glob("*.bin")) or list(directory.glob("*.pth")):
        raise UserError(
            f"{directory} holds pickled weights only, which can run code when read; convert them to safetensors "
            "first (transformers: save_pretrained(..., safe_serialization=True))"
        )
    raise UserError(f"{directory} holds no {SINGLE} and no {INDEX}")
