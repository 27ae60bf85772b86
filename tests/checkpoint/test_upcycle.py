"""Upcycling: the mixture answers as the dense model it was made of, loads in transformers, and can be trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from nanoworks.checkpoint import load_checkpoint, save_checkpoint
from nanoworks.checkpoint.upcycle import upcycle
from nanoworks.cli.main import app
from nanoworks.common.errors import UserError
from nanoworks.models import Decoder
from nanoworks.nn.context import DenseContext
from nanoworks.nn.moe import MoE
from nanoworks.train.launch import launch
from tests.models.families import make
from tests.train.tiny import recipe


def save(model: Decoder, directory: Path) -> Path:
    with save_checkpoint(directory, model, None, metadata={}):
        pass
    return directory


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.head(model(ids, DenseContext(ids)))


@pytest.mark.parametrize(
    ("family", "changes", "becomes"),
    [
        ("llama", {}, "mixtral"),
        ("llama", {"tie_word_embeddings": True}, "mixtral"),
        ("mistral", {}, "mixtral"),
        ("qwen3", {"use_sliding_window": False}, "qwen3_moe"),
        ("qwen3", {"max_window_layers": 0}, "qwen3_moe"),
    ],
)
def test_the_mixture_answers_as_the_dense_model(
    tmp_path: Path, family: str, changes: dict[str, Any], becomes: str
) -> None:
    from transformers import AutoModelForCausalLM

    dense = make(family, **changes)
    # small shards: the streaming path writes an index
    config = upcycle(save(dense, tmp_path / "dense"), tmp_path / "moe", experts=4, top_k=2, max_shard_bytes=100_000)
    loaded = load_checkpoint(tmp_path / "moe")
    assert config.model_type == loaded.config.model_type == becomes
    assert [m.num_experts for m in loaded.model.modules() if isinstance(m, MoE)] == [4, 4, 4]
    torch.testing.assert_close(logits(loaded.model), logits(dense), atol=1e-5, rtol=0)
    assert loaded.model.num_active_parameters() > dense.num_parameters()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", attn_implementation="eager").eval()
    ids = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, logits(dense), atol=1e-5, rtol=0)
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["nanoworks"]["parent"] == str(tmp_path / "dense")


def test_noise_makes_experts_differ_and_is_reproducible(tmp_path: Path) -> None:
    source = save(make("llama"), tmp_path / "dense")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        upcycle(source, tmp_path / name, experts=3, top_k=1, noise=0.1, seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c
    loaded = load_checkpoint(tmp_path / "a").model.requires_grad_(False)
    up = next(m.experts.up_proj.weight for m in loaded.modules() if isinstance(m, MoE))
    apart = (up[0] - up[1]).std() / up[0].std()
    assert 0.12 < float(apart) < 0.16  # the noise of two


def test_a_run_is_upcycled_by_command_and_trained_on(tmp_path: Path) -> None:
    llama = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    dense = launch(recipe(tmp_path, model={**llama, "num_attention_heads": 2}, train={"length": "4 steps"})).run
    out = tmp_path / "moe"
    result = CliRunner().invoke(app, ["upcycle", str(dense), "--experts", "4", "--noise", "0.01", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "a mixtral of 4 experts, 2 a token" in result.output
    changes: dict[str, Any] = {"model": None, "tokenizer": None, "init_from": str(out), "run": {"name": "on"}}
    run = launch(recipe(tmp_path, **changes, moe={"bias_update_rate": 0.01})).run
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["moe/entropy"] > 0.5
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert last["train/loss"] < first["train/loss"]


@pytest.mark.parametrize(
    ("family", "changes", "arguments", "message"),
    [
        ("qwen2", {}, {}, "a qwen2 has no family of mixtures; upcycling goes llama -> mixtral"),
        ("mixtral", {}, {}, "a mixtral has experts already"),
        ("llama", {"mlp_bias": True}, {}, "mlp_bias is True in this llama, and a mixtral has no such thing"),
        ("qwen3", {"max_window_layers": 2}, {}, "layer 0 of this qwen3 sees another window than others"),
        ("llama", {}, {"experts": 2, "top_k": 3}, "a token cannot go to 3 of 2 experts; give --top-k of 2 at most"),
    ],
)
def test_what_cannot_be_upcycled_is_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], arguments: dict[str, int], message: str
) -> None:
    source = save(make(family, **changes), tmp_path / "dense")
    with pytest.raises(UserError, match=message):
        upcycle(source, tmp_path / "moe", **arguments)
    assert not (tmp_path / "moe").exists()


def test_an_existing_directory_is_not_replaced(tmp_path: Path) -> None:
    source = save(make("llama"), tmp_path / "dense")
    with pytest.raises(UserError, match="exists already"):
        upcycle(source, source)
