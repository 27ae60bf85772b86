"""A dense model as a mixture of experts: each expert begins as a copy of the feed-forward block it replaces.

Sparse upcycling, https://arxiv.org/abs/2212.05055. The weights of a token's experts sum to 1, so right after it the
mixture answers as the dense model does; training then makes the experts differ. Tensors are written one at a time:
the result is never in memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanoworks.checkpoint.checkpoint import locate, read_json, write_sorted
from nanoworks.checkpoint.nanochat import is_nanochat
from nanoworks.checkpoint.safetensors_file import Spec
from nanoworks.checkpoint.weights import MAX_SHARD_BYTES, WeightFiles, hf_keymap, write_shards
from nanoworks.common.errors import UserError
from nanoworks.common.files import atomic_directory, verify_directory
from nanoworks.config.model import ModelConfig
from nanoworks.models import ARCHITECTURES, build_model, config_from_dict, config_from_hf

# Dense family -> the family of its mixture, and what the mixture's configuration says besides.
_MIXTURES: Mapping[str, tuple[str, Callable[[ModelConfig, int], dict[str, Any]]]] = {
    "llama": ("mixtral", lambda c, experts: {"num_local_experts": experts}),
    "mistral": ("mixtral", lambda c, experts: {"num_local_experts": experts}),
    "qwen3": (
        "qwen3_moe",
        lambda c, experts: {
            "num_experts": experts,
            "moe_intermediate_size": c.intermediate_size,
            "norm_topk_prob": True,
        },
    ),
}
_COMPANIONS = ("tokenizer*", "*.jinja", "*.model", "special_tokens_map.json", "generation_config.json")


def upcycle(
    source: str | Path,
    out: Path,
    *,
    experts: int = 8,
    top_k: int = 2,
    noise: float = 0.0,
    seed: int = 0,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> ModelConfig:
    """Write the dense model at `source` (a run, step, model directory or hub id) as a mixture of `experts`.

    Args:
        out: new directory.
        top_k: how many of the experts a token goes to.
        noise: standard deviation of what is added to the weights of each expert, as a share of their own: experts
            that begin alike part sooner, and the first answers differ that much.
        seed: of the noise and of the routers' first weights.

    Raises:
        UserError: a family without a mixture, something in its configuration that the mixture has no place for,
            numbers that do not fit, damaged files, or `out` exists.
    """
    if out.exists():
        raise UserError(f"{out} exists already; choose another --out")
    directory = locate(source)
    if is_nanochat(directory):
        raise UserError(f"{directory} is a nanochat checkpoint; {_known()}")
    verify_directory(directory)
    dense = config_from_hf(read_json(directory / "config.json"))
    sparse = sparse_config(dense, experts=experts, top_k=top_k)
    with torch.device("meta"):
        dense_model, sparse_model = build_model(dense), build_model(sparse)
    keymap = hf_keymap(sparse_model)
    with WeightFiles(directory, dense_model) as files, atomic_directory(out) as scratch:
        dtype = next(iter(files.specs.values())).dtype
        specs: dict[str, Spec] = {}
        ours: dict[str, str] = {}
        for name, parameter in sparse_model.named_parameters():
            for expert in range(experts) if keymap.stacks(name) else [None]:
                foreign = str(keymap.to_foreign(name, expert))
                ours[foreign] = name
                specs[foreign] = Spec(dtype, tuple(parameter.shape[expert is not None :]))
        seeds = {foreign: seed + i for i, foreign in enumerate(specs)}

        def read(foreign: str) -> Tensor:
            name, generator = ours[foreign], torch.Generator().manual_seed(seeds[foreign])
            if name.endswith("mlp.gate.weight"):
                std = sparse.initializer_range  # type: ignore[attr-defined]
                return (std * torch.randn(specs[foreign].shape, generator=generator)).to(dtype)
            tensor = files.read_ours(name.replace(".experts.", "."))
            if noise and ".experts." in name:
                tensor = tensor + noise * tensor.float().std() * torch.randn(tensor.shape, generator=generator)
            return tensor.to(dtype)

        write_shards(scratch, specs, read, max_shard_bytes=max_shard_bytes)
        made = {"parent": str(directory), "upcycled": {"experts": experts, "top_k": top_k, "noise": noise}}
        stored = str(dtype).removeprefix("torch.")
        write_sorted(scratch / "config.json", {**sparse.to_hf(), "dtype": stored, "nanoworks": made})
        for pattern in _COMPANIONS:
            for file in directory.glob(pattern):
                shutil.copy(file, scratch / file.name)
    return sparse


def sparse_config(dense: ModelConfig, *, experts: int, top_k: int) -> ModelConfig:
    """The configuration of `dense` as a mixture.

    Raises:
        UserError: as for `upcycle`.
    """
    if dense.model_type in {family for family, _ in _MIXTURES.values()}:
        raise UserError(f"a {dense.model_type} has experts already; {_known()}")
    if dense.model_type not in _MIXTURES:
        raise UserError(f"a {dense.model_type} has no family of mixtures; {_known()}")
    if top_k > experts:
        raise UserError(f"a token cannot go to {top_k} of {experts} experts; give --top-k of {experts} at most")
    family, more = _MIXTURES[dense.model_type]
    own = dense.model_dump(exclude={"model_type"}, exclude_none=True)
    places = ARCHITECTURES.get(family).config_cls.model_fields
    for key, value in own.items():
        if key not in places and value != type(dense).model_fields[key].default:
            raise UserError(f"{key} is {value} in this {dense.model_type}, and a {family} has no such thing")
    kept = {key: value for key, value in own.items() if key in places}
    sparse = config_from_dict({**kept, **more(dense, experts), "num_experts_per_tok": top_k, "model_type": family})
    for layer in range(dense.num_hidden_layers):
        if _window(dense, layer) != _window(sparse, layer):
            raise UserError(
                f"layer {layer} of this {dense.model_type} sees another window than others, which no {family} does; "
                "give all layers the window, or none"
            )
    return sparse


def _window(config: ModelConfig, layer: int) -> object:
    return config.window(layer) if hasattr(config, "window") else None


def _known() -> str:
    return "upcycling goes " + ", ".join(f"{dense} -> {sparse}" for dense, (sparse, _) in _MIXTURES.items())
