"""The figures of `nanoworks tokenizer eval`, and that it never downloads."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanoworks.tokenizer import Tokenizer
from nanoworks.tokenizer.compression import PUBLISHED, SAMPLES, bytes_per_token, published_encoding


def test_bytes_per_token(tokenizer: Tokenizer) -> None:
    assert bytes_per_token(lambda text: list(text.encode()), "né 你") == 1.0
    assert bytes_per_token(lambda text: [0, 0], "你好") == 3.0
    figures = {domain: bytes_per_token(tokenizer.encode, text) for domain, text in SAMPLES.items()}
    assert len(figures) == 5
    assert figures["English prose"] > figures["numbers and math"] > figures["non-Latin scripts"] >= 1.0


def test_never_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tiktoken.load
    import tiktoken.registry

    def network(*_: object, **__: object) -> None:
        raise AssertionError("reached for the network")

    monkeypatch.setattr("requests.get", network)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    read_file = tiktoken.load.read_file
    for name in PUBLISHED.values():
        assert published_encoding(name) is None
    assert tiktoken.load.read_file is read_file
