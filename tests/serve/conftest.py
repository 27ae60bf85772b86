"""Tiny models behind the real engine: one with random weights, and some whose every word is known."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch

from nanoworks.engine import AsyncEngine, Engine
from nanoworks.models import build_model, config_from_dict
from nanoworks.serve.app import create_app
from nanoworks.serve.server import Server, listen
from nanoworks.serve.settings import ServerSettings
from nanoworks.tokenizer import SPLIT_PATTERN, Tokenizer

Rules = dict[str, str]

# The engine writes <|output_start|>6<|output_end|> by itself after python_end.
CALCULATES: Rules = {
    "<|assistant_start|>": "=",
    "=": "<|python_start|>",
    "<|python_start|>": "2",
    "2": "*",
    "*": "3",
    "3": "<|python_end|>",
    "<|output_end|>": "!",
    "!": "<|assistant_end|>",
}
NEVER_ENDS: Rules = {"<|assistant_start|>": "a", "a": "b", "b": "a"}


def _random_engine(*, context: int, hidden_size: int = 32, words: Sequence[str] = ()) -> Engine:
    """A llama over single bytes, some `words` and the special tokens."""
    torch.manual_seed(0)
    tokens = [*(bytes([i]) for i in range(256)), *(word.encode() for word in words)]
    tokenizer = Tokenizer.from_ranks({token: i for i, token in enumerate(tokens)}, SPLIT_PATTERN)
    config = {
        "model_type": "llama",
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        "initializer_range": 0.5,
    }
    model = build_model(config_from_dict(config))
    model.init_weights()
    return Engine(model.eval(), tokenizer)


def _scripted_engine(rules: Rules, *, context: int, words: Sequence[str] = ()) -> Engine:
    """An engine whose model goes from a token to the next by `rules`: one-hot embedding, idle layers."""
    engine = _random_engine(context=context, hidden_size=288, words=words)
    model, tokenizer = engine.model, engine.tokenizer

    def token(word: str) -> int:
        if word in words:
            return 256 + words.index(word)
        return tokenizer.special_tokens.get(word) or tokenizer.encode(word)[0]

    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.embed_tokens.weight.copy_(torch.eye(*model.embed_tokens.weight.shape))
        model.head.lm_head.weight.zero_()
        for word, following in rules.items():
            model.head.lm_head.weight[token(following), token(word)] = 5.0
    return engine


@pytest.fixture(scope="session")
def make_engine() -> Callable[..., Engine]:
    """Random weights; for tests that spoil their engine."""
    return _random_engine


@pytest.fixture(scope="session")
def scripted_engine() -> Callable[..., Engine]:
    """Follows the rules it is given."""
    return _scripted_engine


@pytest.fixture(scope="module")
def random_engine() -> Engine:
    """Random weights, a context of 128 tokens."""
    return _random_engine(context=128)


@pytest.fixture(scope="module")
def calculating_engine() -> Engine:
    """Always answers `=`, calls the calculator with 2*3, and ends with `!`."""
    return _scripted_engine(CALCULATES, context=128)


@pytest.fixture(scope="module")
def endless_engine() -> Engine:
    """Answers `ababab...` until its context of 20,000 tokens is full, which takes many seconds."""
    return _scripted_engine(NEVER_ENDS, context=20_000)


@contextmanager
def _serve(engine: Engine, settings: ServerSettings | None = None) -> Iterator[str]:
    """Run the app under a real uvicorn on a free port; yields its URL, and stops it at the end."""
    with listen("127.0.0.1", 0) as sock:
        server = Server(create_app(AsyncEngine(engine), name="tiny", settings=settings), announcement="ready")
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=60)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def serve() -> Callable[..., AbstractContextManager[str]]:
    return _serve
