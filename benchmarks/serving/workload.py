"""What is measured: model sizes, prompts, rows. Standard library only, because every peer's environment imports it."""

from __future__ import annotations

import random
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / ".bench"
"""Models, results and the peers' environments; git ignores it."""

VOCAB = 32000
CONTEXT = 1024
"""Tokens that every engine makes room for in a sequence."""

# Shapes of random Llama models. Time depends on shapes, not on values. "tiny" is to try the benchmark itself.
SIZES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "120m": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
    "1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
}

PROMPT, NEW = 128, 64
LONG_PROMPT = 512
"""Tokens of the prompt whose time to the first token is the prefill row."""

# (prompt, output) tokens of the 16 mixed requests: 2,039 in, 1,129 out.
MIXED = [
    (114, 51), (133, 115), (44, 41), (242, 100), (56, 78), (181, 39), (161, 59), (41, 43),
    (143, 85), (49, 62), (55, 102), (140, 39), (243, 104), (63, 60), (193, 112), (181, 39),
]  # fmt: skip

ROWS = ("prefill", "decode", "mixed16")

# Engines of each precision, ours first, and what each one calls it.
ENGINES: dict[str, dict[str, str]] = {
    "bf16": {"nanoworks": "bf16", "vllm": "bf16", "llama.cpp": "bf16", "transformers": "bf16"},
    "int8": {"nanoworks": "int8", "openvino": "int8", "llama.cpp": "q8_0"},
    "int4": {"nanoworks": "int4", "openvino": "int4", "llama.cpp": "q4_0"},
}


def prompts(rng: random.Random, lengths: list[int]) -> list[list[int]]:
    """Random prompts: no two share a beginning, so no engine finds one in a cache of prefixes."""
    return [[rng.randrange(300, VOCAB - 1) for _ in range(length)] for length in lengths]


def weights(size: str) -> int:
    """Weights of the matrices that a decoded token is multiplied with: all but the embedding."""
    s = SIZES[size]
    head_dim = s["hidden_size"] // s["num_attention_heads"]
    attention = s["hidden_size"] * head_dim * (2 * s["num_attention_heads"] + 2 * s["num_key_value_heads"])
    mlp = 3 * s["hidden_size"] * s["intermediate_size"]
    return s["num_hidden_layers"] * (attention + mlp) + VOCAB * s["hidden_size"]
