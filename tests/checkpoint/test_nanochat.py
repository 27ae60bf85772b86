"""nanochat's checkpoints, against figures that the real nanochat computed (see tests/data/README.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nanoworks
from nanoworks.checkpoint import load_checkpoint
from nanoworks.checkpoint.nanochat import export_nanochat
from nanoworks.common.errors import UserError
from nanoworks.models import build_model, config_from_dict
from nanoworks.nn.context import DenseContext

TOLERANCE = {"atol": 2e-5, "rtol": 0.0}


@pytest.fixture(scope="module")
def old(shared_dir: Path) -> Path:
    return shared_dir / "golden" / "nanochat" / "old"


@pytest.fixture(scope="module")
def golden(old: Path) -> dict[str, Any]:
    return json.loads((old / "golden.json").read_text())


@pytest.fixture(scope="module")
def model(old: Path) -> nanoworks.LoadedModel:
    return nanoworks.load(old / "base" / "base_checkpoints" / "d2", device="cpu")


def fixed_tokens(vocab: int, rows: int, columns: int, seed: int) -> torch.Tensor:
    ids, x = [], seed
    for _ in range(rows * columns):
        x = (1103515245 * x + 12345) % 2**31
        ids.append((x >> 8) % (vocab - 9))
    return torch.tensor(ids).view(rows, columns)


def test_logits_and_losses(old: Path, golden: dict[str, Any], model: nanoworks.LoadedModel) -> None:
    base = golden["base_d2"]
    ids = fixed_tokens(1024, 3, 97, 1337)
    x, y = ids[:, :96], ids[:, 1:]
    logits = model.logits(x)
    expected = torch.from_numpy(np.load(old / "tensors.npz")["base_d2.logits_b0"])
    torch.testing.assert_close(logits[0], expected, **TOLERANCE)
    for place in base["logits"]:
        row = logits[place["b"], place["pos"]]
        assert row.logsumexp(-1).item() == pytest.approx(place["logsumexp"], abs=2e-5)
        torch.testing.assert_close(row[:16], torch.tensor(place["first16"]), **TOLERANCE)
    with torch.no_grad():
        hidden = model.model(x, DenseContext(x))
        total = model.model.head.loss(hidden, y, torch.ones(y.shape))
        weights = torch.ones(y.numel())
        weights[::3] = 0
        masked = model.model.head.loss(hidden, y, weights.view_as(y))
    assert (total / y.numel()).item() == pytest.approx(base["loss"]["mean"], abs=2e-5)
    assert (masked / weights.sum()).item() == pytest.approx(base["loss"]["mean_every3rd_target_ignored"], abs=2e-5)


def test_depth_dial_figures(golden: dict[str, Any], model: nanoworks.LoadedModel) -> None:
    base = golden["base_d2"]
    assert model.model.num_parameters() == base["num_params"]
    assert model.model.flops_per_token(256) == base["flops_per_token"]


def test_depth_dial_of_every_depth(old: Path) -> None:
    for line in (old / "hyperparams.jsonl").read_text().splitlines():
        g = json.loads(line)
        config = config_from_dict({"model_type": "nanochat", "depth": g["depth"], "vocab_size": g["vocab"]})
        with torch.device("meta"):
            model = build_model(config)
        assert (config.hidden_size, config.num_attention_heads) == (g["model_dim"], g["num_heads"])
        assert model.num_parameters() == g["num_params"]
        assert model.flops_per_token(g["max_seq_len"]) == g["num_flops_per_token"]
        assert 20 * model.num_parameters() // g["total_batch_size"] == g["num_iterations"]


def test_initial_weights_are_nanochats(golden: dict[str, Any]) -> None:
    model = build_model(config_from_dict({"model_type": "nanochat", "depth": 2, "vocab_size": 1024}))
    torch.manual_seed(42)
    model.init_weights()
    for ours, theirs in (
        ("embed_tokens.weight", "transformer.wte.weight"),
        ("layers.0.self_attn.q_proj.weight", "transformer.h.0.attn.c_q.weight"),
        ("layers.1.mlp.fc1.weight", "transformer.h.1.mlp.c_fc.weight"),
        ("layers.1.mlp.fc2.weight", "transformer.h.1.mlp.c_proj.weight"),
    ):
        tensor, stats = model.get_parameter(ours).detach(), golden["init_seed42_d2"][theirs]
        assert tensor.double().norm().item() == pytest.approx(stats["norm"], rel=1e-6)
        assert tensor.flatten()[:4].tolist() == pytest.approx(stats["first4"], rel=1e-6)


def test_export_and_import_give_the_same_tensors(
    tmp_path: Path, old: Path, golden: dict[str, Any], model: nanoworks.LoadedModel
) -> None:
    export_nanochat(model.model, model.tokenizer, tmp_path / "d2", step=120)
    again = nanoworks.load(tmp_path / "d2", device="cpu")
    for name, parameter in model.model.named_parameters():
        assert torch.equal(parameter, again.model.get_parameter(name)), name
    assert again.tokenizer.fingerprint == model.tokenizer.fingerprint
    ours = torch.load(tmp_path / "d2" / "model_000120.pt", weights_only=True)
    theirs = torch.load(old / "base/base_checkpoints/d2/model_000120.pt", weights_only=True)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k].float()) for k in ours)
    config = json.loads((tmp_path / "d2" / "meta_000120.json").read_text())["model_config"]
    assert config == golden["checkpoint_meta"]["model_config"]


def test_damaged_files_are_refused(tmp_path: Path, old: Path) -> None:
    folder = tmp_path / "d2"
    folder.mkdir()
    source = old / "base/base_checkpoints/d2"
    data = (source / "model_000120.pt").read_bytes()
    (folder / "model_000120.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"meta_000120\.json is missing"):
        load_checkpoint(folder)
    (folder / "meta_000120.json").write_bytes((source / "meta_000120.json").read_bytes())
    with pytest.raises(UserError, match=r"model_000120\.pt is truncated"):
        load_checkpoint(folder)
