"""A tiny configuration of every family, and the variants that the conformance suite runs besides.

A family that is added to the registry must have an entry in `TINY`; everything else follows from it.
"""

from __future__ import annotations

from typing import Any

import torch

from nanoworks.models import ARCHITECTURES, Decoder, build_model, config_from_dict

CONTEXT = 64
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
TINY: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "mistral": {**SIZES, "sliding_window": 12},
    "mixtral": {**SIZES, "num_local_experts": 4, "sliding_window": 20},
    "qwen2": {**SIZES, "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    "qwen3": {**SIZES, "head_dim": 32, "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2},
    "qwen3_moe": {**SIZES, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40},
    "smollm3": {**SIZES, "no_rope_layer_interval": 2},
    "nanochat": {**SIZES, "num_key_value_heads": 4, "intermediate_size": 256},
    "nanochat_2026": {**SIZES, "intermediate_size": 256, "sliding_window": 12},
}
FACTORS = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + 0.5 * i for i in range(8)]}
SCALED = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "longrope": {**FACTORS, "factor": 2.0, "original_max_position_embeddings": 32},
    "proportional": {"factor": 2.0, "partial_rotary_factor": 0.5},
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in TINY),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    *(("llama", {"rope_scaling": {"rope_type": kind, **keys}}) for kind, keys in SCALED.items()),
    ("llama", {"rope_scaling": {"rope_type": "yarn", **SCALED["yarn"], "mscale": 0.7, "mscale_all_dim": 1.0}}),
    ("llama", {"rope_scaling": {"rope_type": "yarn", **SCALED["yarn"], "truncate": False}}),
    ("mistral", {"sliding_window": None}),
    ("mixtral", {"num_experts_per_tok": 1}),
    ("qwen2", {"tie_word_embeddings": True, "use_sliding_window": False}),
    ("qwen3", {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [1]}),
    ("qwen3_moe", {"decoder_sparse_step": 2, "num_experts_per_tok": 6}),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 12, "no_rope_layers": [0, 1, 0]}),
    ("smollm3", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
]
WITHOUT_REFERENCE = {"nanochat_2026": "transformers has no such model; tests/models/test_nanochat_2026.py has goldens"}
"""Families that cannot be compared with transformers, and why."""
COMPARED = [variant for variant in VARIANTS if variant[0] not in WITHOUT_REFERENCE]


def name_of(variant: tuple[str, dict[str, Any]]) -> str:
    family, changes = variant
    return "-".join([family, *(f"{k}={v['rope_type'] if isinstance(v, dict) else v}" for k, v in changes.items())])


def make(family: str, **changes: Any) -> Decoder:
    """A random model; every matrix has weights, whatever the family's own initialisation zeroes."""
    torch.manual_seed(0)
    model = build_model(config_from_dict({"model_type": family, **TINY[family], **changes}))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.08)
    return model.eval()


def families() -> list[str]:
    """Every family of the registry."""
    return list(ARCHITECTURES)
