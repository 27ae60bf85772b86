"""nanochat's dial of 2026: from the depth of a `nanochat_2026`, how long to train it, in what portions and how fast.

    python -m nanoworks.train.depth_dial 26 > d26.yaml    # a recipe that extends pretrain/nanochat_2026
    nanoworks train d26.yaml

Everything is scaled from depth 12, where the rates were tuned at 2**19 tokens a step. The length is 12 tokens for
each parameter of the layers and the head. The batch grows with length ** 0.383 (https://arxiv.org/abs/2505.13738),
rounded to a power of two. Learning rates follow the square root of the batch. Weight decay is such that
batch / (rate * decay * length) stays what it is at depth 12 (https://arxiv.org/abs/2405.13698).
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
import yaml

from nanoworks.models import build_model, config_from_dict
from nanoworks.models.nanochat_2026 import Nanochat2026, Nanochat2026Config
from nanoworks.train.muon_2026 import MuonAdamW2026

REFERENCE_DEPTH = 12
REFERENCE_BATCH = 2**19
TOKENS_PER_PARAMETER = 12
BATCH_EXPONENT = 0.383


def depth_dial(config: Nanochat2026Config) -> dict[str, Any]:
    """Return what follows from the size of the model, as the sections `train` and `optim` of a recipe."""
    reference = TOKENS_PER_PARAMETER * _scaling_parameters(_of_depth(REFERENCE_DEPTH, config.vocab_size))
    tokens = TOKENS_PER_PARAMETER * _scaling_parameters(config)
    batch = 2 ** round(math.log2(REFERENCE_BATCH * (tokens / reference) ** BATCH_EXPONENT))
    rate = math.sqrt(batch / REFERENCE_BATCH)
    tuned = MuonAdamW2026.Options()
    scaled = ("lr_matrix", "lr_embedding", "lr_unembedding", "lr_scalar")
    return {
        "train": {"length": f"{tokens} tokens", "tokens_per_step": batch},
        "optim": {
            **{key: getattr(tuned, key) * rate for key in scaled},
            "weight_decay": tuned.weight_decay * rate * (reference / tokens),
        },
    }


def _of_depth(depth: int, vocab_size: int) -> Nanochat2026Config:
    config = config_from_dict({"model_type": "nanochat_2026", "depth": depth, "vocab_size": vocab_size})
    assert isinstance(config, Nanochat2026Config)
    return config


def _scaling_parameters(config: Nanochat2026Config) -> int:
    with torch.device("meta"):
        model = build_model(config)
    assert isinstance(model, Nanochat2026)
    return model.scaling_parameters()


def main() -> None:
    parser = argparse.ArgumentParser(description="Print a recipe for a nanochat_2026 of the given depth.")
    parser.add_argument("depth", type=int)
    parser.add_argument("--vocab-size", type=int, default=32768, help="of the tokenizer (default 32768)")
    arguments = parser.parse_args()
    dial = depth_dial(_of_depth(arguments.depth, arguments.vocab_size))
    recipe = {"extends": "pretrain/nanochat_2026", "model": {"depth": arguments.depth}, **dial}
    print(yaml.safe_dump(recipe, sort_keys=False), end="")


if __name__ == "__main__":
    main()
