"""A byte tokenizer and small random models whose outputs depend on every token they saw."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nanoworks.models import Decoder, build_model, config_from_dict
from nanoworks.nn.context import DenseContext
from nanoworks.tokenizer import SPLIT_PATTERN, Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """256 bytes and nanochat's special tokens."""
    return Tokenizer.from_ranks({bytes([i]): i for i in range(256)}, SPLIT_PATTERN)


def build(family: str = "llama", *, context: int = 128, vocab_size: int = 265, **own: object) -> Decoder:
    torch.manual_seed(0)
    config = {
        "model_type": family,
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        **own,
    }
    model = build_model(config_from_dict(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="session")
def model() -> Decoder:
    return build()


@pytest.fixture(scope="session")
def new_model() -> Callable[..., Decoder]:
    return build


@torch.no_grad()
def dense_logprobs(model: Decoder, ids: list[int]) -> torch.Tensor:
    tokens = torch.tensor([ids])
    return model.head(model(tokens, DenseContext(tokens)))[0].log_softmax(-1)


@pytest.fixture(scope="session")
def logprobs() -> Callable[[Decoder, list[int]], torch.Tensor]:
    """(T, V) log-probabilities after each of T tokens, without any cache."""
    return dense_logprobs


@pytest.fixture(scope="session")
def greedy() -> Callable[[Decoder, list[int], int], list[int]]:
    """Greedy continuation without any cache."""

    def run(model: Decoder, prompt: list[int], length: int) -> list[int]:
        ids = list(prompt)
        for _ in range(length):
            ids.append(int(dense_logprobs(model, ids)[-1].argmax()))
        return ids[len(prompt) :]

    return run
