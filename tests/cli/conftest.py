from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nanoworks.checkpoint import save_checkpoint
from nanoworks.models import build_model, config_from_dict
from nanoworks.tokenizer import SPLIT_PATTERN, Tokenizer


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama over single bytes, with a context of 128 tokens."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_ranks({bytes([i]): i for i in range(256)}, SPLIT_PATTERN)
    config = {
        "model_type": "llama",
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.5,
    }
    model = build_model(config_from_dict(config))
    model.init_weights()
    path = tmp_path_factory.mktemp("cli") / "tiny"
    with save_checkpoint(path, model, tokenizer, metadata={}):
        pass
    return path
