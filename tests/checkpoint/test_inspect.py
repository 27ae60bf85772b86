"""`inspect`: the figures of a model, by hand for small ones and for known large ones, without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from nanoworks.checkpoint.describe import describe
from nanoworks.cli.main import app
from tests.checkpoint import models


def config_only(path: Path, **values: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(values))
    return path


LLAMA_1B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "rope_theta": 500000.0,
}


def test_llama_3_2_1b(tmp_path: Path) -> None:
    found = describe(config_only(tmp_path / "m", **LLAMA_1B), context=8192)
    assert found.parameters == found.active_parameters == 1_235_814_400
    assert found.kv_bytes_per_token == 2 * 16 * 8 * 64 * 2 == 32_768
    assert found.kv_bytes == 8192 * 32_768
    assert found.weight_bytes == 2 * 1_235_814_400
    assert found.flops_per_token == 2 * 1_235_814_400 + 4 * 16 * 2048 * 8192
    assert found.stored_dtypes == {}
    assert found.tokenizer is None


def test_mixtral_8x7b(tmp_path: Path) -> None:
    values = {
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32768,
    }
    found = describe(config_only(tmp_path / "m", **values))
    assert found.parameters == 46_702_792_704
    assert found.active_parameters == 46_702_792_704 - 32 * 6 * 3 * 4096 * 14336
    assert found.experts == {"total": 8, "a token": 2}


@pytest.mark.parametrize("family", ["llama", "llama-tied", "mistral", "mixtral"])
def test_a_checkpoint(tmp_path: Path, family: str) -> None:
    model = models.make(family)
    path = models.save(tmp_path / "m", model, dtype=torch.bfloat16)
    found = describe(path, dtype=torch.float32)
    assert found.stored_dtypes == {"bfloat16": 2 * model.num_parameters()}
    if family.startswith("llama"):
        assert 3 * found.flops_per_token == model.flops_per_token(256)
    seen = 96 if family == "mistral" else 256
    assert found.kv_bytes == 2 * seen * 2 * 2 * 16 * 4  # two layers, two heads, keys and values
    assert found.tokenizer is not None
    assert found.tokenizer["vocab_size"] == 320
    assert found.tokenizer["special_tokens"]["<|bos|>"] == found.tokenizer["bos_id"]


def test_the_command(tmp_path: Path, shared_dir: Path) -> None:
    path = models.save(tmp_path / "m", models.make("mistral"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "nanoworks": {"run_id": "abc", "parent": "base"}}))
    shown = CliRunner().invoke(app, ["inspect", str(path), "--context", "64"]).output
    for words in (
        "mistral (MistralForCausalLM)",
        "96 tokens",
        "run id            abc",
        "<|bos|> 311",
        "64 tokens (the",
    ):
        assert words in shown, words
    result = CliRunner().invoke(app, ["inspect", str(path), "--json"])
    assert json.loads(result.output)["lineage"] == {"run_id": "abc", "parent": "base"}
    nanochat = shared_dir / "golden/nanochat/old/base/base_checkpoints/d2"
    found = json.loads(CliRunner().invoke(app, ["inspect", str(nanochat), "--json"]).output)
    assert found["family"] == "nanochat"
    assert found["parameters"] == 655_360
