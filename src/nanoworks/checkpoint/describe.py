"""What a checkpoint is and what it will cost, from its config and the headers of its files: no weights are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nanoworks.checkpoint.checkpoint import fetch, load_checkpoint, locate, read_json
from nanoworks.checkpoint.nanochat import is_nanochat
from nanoworks.checkpoint.weights import WeightFiles
from nanoworks.models import Decoder, build_model, config_from_hf
from nanoworks.nn.linear import GroupedLinear
from nanoworks.tokenizer import Tokenizer


@dataclass(frozen=True)
class Description:
    """Figures for sequences of `context` tokens in `dtype`."""

    path: str
    family: str
    architecture: str
    stored_dtypes: dict[str, int]
    """Bytes of the weights by dtype; empty where they are not here."""
    parameters: int
    """Each once: a tied head is the embedding's."""
    active_parameters: int
    """That one token uses: of the experts, as many as it is sent to."""
    layers: int
    hidden_size: int
    heads: int
    key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    windows: list[int | None]
    """Tokens that each layer sees; None is all."""
    rope: dict[str, Any]
    experts: dict[str, int] | None
    tied_head: bool
    context: int
    dtype: str
    flops_per_token: int
    """Of the forward pass of a token that sees the whole context; training takes three times that."""
    kv_bytes_per_token: int
    weight_bytes: int
    kv_bytes: int
    """Of one sequence of `context` tokens: a layer with a window keeps no more than that."""
    tokenizer: dict[str, Any] | None
    lineage: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def describe(source: str | Path, *, context: int | None = None, dtype: torch.dtype = torch.bfloat16) -> Description:
    """Describe a run, step, directory or hub id (of which no weights are downloaded).

    Args:
        context: tokens a sequence; None is the model's own.
        dtype: of weights and KV cache in the figures of memory.

    Raises:
        UserError: nothing there, an unknown family, or tensors that do not fit the config.
    """
    directory = locate(source) if Path(source).is_dir() else fetch(str(source), weights=False)
    stored: Mapping[str, int] = {}
    if is_nanochat(directory):
        checkpoint = load_checkpoint(directory)
        model, tokenizer, lineage = checkpoint.model, checkpoint.tokenizer, dict(checkpoint.metadata)
        stored = _bytes_by_dtype((p.dtype, p.nbytes) for p in model.parameters())
    else:
        raw = read_json(directory / "config.json")
        with torch.device("meta"):
            model = build_model(config_from_hf(raw))
        if any(directory.glob("*.safetensors")):
            with WeightFiles(directory, model) as files:
                stored = _bytes_by_dtype((spec.dtype, spec.nbytes) for spec in files.specs.values())
        tokenizer = Tokenizer.load(directory) if (directory / "tokenizer.json").is_file() else None
        lineage = dict(raw.get("nanoworks", {}))
    return _figures(model, str(source), stored, tokenizer, lineage, context, dtype)


def _figures(
    model: Decoder,
    path: str,
    stored: Mapping[str, int],
    tokenizer: Tokenizer | None,
    lineage: dict[str, Any],
    context: int | None,
    dtype: torch.dtype,
) -> Description:
    c: Any = model.config
    context = context or c.max_position_embeddings
    total = model.num_parameters()
    grouped = [m for m in model.modules() if isinstance(m, GroupedLinear)]
    active = model.num_active_parameters()
    looked_up = 0 if c.tie_word_embeddings else model.embed_tokens.weight.numel()
    windows = [getattr(getattr(layer.self_attn, "window", None), "size", None) for layer in model.layers]
    seen = [min(context, window or context) for window in windows]
    kv = 2 * c.num_key_value_heads * c.head_dim * dtype.itemsize
    return Description(
        path=path,
        family=c.model_type,
        architecture=c.hf_architecture,
        stored_dtypes=dict(stored),
        parameters=total,
        active_parameters=active,
        layers=c.num_hidden_layers,
        hidden_size=c.hidden_size,
        heads=c.num_attention_heads,
        key_value_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        max_position_embeddings=c.max_position_embeddings,
        windows=windows,
        rope={"theta": c.rope_theta, **(c.rope_scaling.model_dump(exclude_none=True) if c.rope_scaling else {})},
        experts={"total": grouped[0].num_experts, "a token": c.num_experts_per_tok} if grouped else None,
        tied_head=c.tie_word_embeddings,
        context=context,
        dtype=str(dtype).removeprefix("torch."),
        flops_per_token=2 * (active - looked_up) + 4 * c.num_attention_heads * c.head_dim * sum(seen),
        kv_bytes_per_token=kv * c.num_hidden_layers,
        weight_bytes=total * dtype.itemsize,
        kv_bytes=kv * sum(seen),
        tokenizer=_tokenizer(tokenizer),
        lineage=lineage,
    )


def _bytes_by_dtype(sizes: Any) -> dict[str, int]:
    found: Counter[str] = Counter()
    for dtype, nbytes in sizes:
        found[str(dtype).removeprefix("torch.")] += nbytes
    return dict(found)


def _tokenizer(tokenizer: Tokenizer | None) -> dict[str, Any] | None:
    if tokenizer is None:
        return None
    return {
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "special_tokens": dict(tokenizer.special_tokens),
        "fingerprint": tokenizer.fingerprint,
    }
