"""Tiny models of every family for the tests of this folder, with weights that make each part matter."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

from nanoworks.checkpoint import save_checkpoint
from nanoworks.models import Decoder, build_model, config_from_dict
from nanoworks.tokenizer import Tokenizer, train_tokenizer

TEXT = "the quick brown fox jumps over the lazy dog, and the other 27 foxes don't. " * 4 + "naïve: 你好 🙂\n\n"

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-biased": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 96},
    "mixtral": {"num_local_experts": 4},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    | {"norm_topk_prob": True},
}


@cache
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT], 320)


def make(family: str = "llama", *, seed: int = 0, **changes: Any) -> Decoder:
    """A model of `family`, a key of FAMILIES, with random weights: matrices N(0, 0.15), norms around 1."""
    torch.manual_seed(seed)
    values = {
        "model_type": family.split("-")[0],
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    model = build_model(config_from_dict({**values, **FAMILIES.get(family, {}), **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)
    return model


def save(path: Path, model: Decoder, *, dtype: torch.dtype = torch.float32) -> Path:
    with save_checkpoint(path, model.to(dtype), tokenizer(), metadata={}):
        pass
    return path
