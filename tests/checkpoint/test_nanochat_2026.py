"""Checkpoints of nanochat from March 2026 on, against figures that the real one (92d63d4) computed."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import nanoworks
from nanoworks.checkpoint import load_checkpoint, save_checkpoint
from nanoworks.checkpoint.nanochat import era_of, export_nanochat
from nanoworks.common.errors import UserError
from nanoworks.data import Loader, build_source
from nanoworks.evals.bpb import bits_per_byte
from nanoworks.models import build_model, config_from_dict
from nanoworks.models.nanochat_2026 import Nanochat2026
from nanoworks.nn.context import DenseContext, Window

TOLERANCE = {"atol": 2e-5, "rtol": 0.0}


@pytest.fixture(scope="module")
def new(shared_dir: Path) -> Path:
    return shared_dir / "golden" / "nanochat" / "new"


@pytest.fixture(scope="module")
def golden(new: Path) -> dict[str, Any]:
    return json.loads((new / "golden.json").read_text())


@pytest.fixture(scope="module")
def model(new: Path) -> nanoworks.LoadedModel:
    return nanoworks.load(new / "base" / "base_checkpoints" / "d4", device="cpu")


def fixed_tokens(vocab: int, rows: int, columns: int, seed: int) -> Tensor:
    ids, x = [], seed
    for _ in range(rows * columns):
        x = (1103515245 * x + 12345) % 2**31
        ids.append((x >> 8) % (vocab - 9))
    return torch.tensor(ids).view(rows, columns)


def test_logits_and_losses(new: Path, golden: dict[str, Any], model: nanoworks.LoadedModel) -> None:
    base = golden["base_d4"]
    ids = fixed_tokens(1024, 3, 201, 1337)
    x, y = ids[:, :200], ids[:, 1:]
    assert x[0, :8].tolist() == base["x0_first8"]
    logits = model.logits(x)
    expected = torch.from_numpy(np.load(new / "tensors.npz")["base_d4.logits_b0"])
    torch.testing.assert_close(logits[0, ::4], expected, **TOLERANCE)
    for place in base["logits"]:
        row = logits[place["b"], place["pos"]]
        assert row.logsumexp(-1).item() == pytest.approx(place["logsumexp"], abs=2e-5)
        torch.testing.assert_close(row[:16], torch.tensor(place["first16"]), **TOLERANCE)
        assert row.topk(8).indices.tolist() == place["top8_ids"]
    with torch.no_grad():
        hidden = model.model(x, DenseContext(x))
        total = model.model.head.loss(hidden, y, torch.ones(y.shape))
        weights = torch.ones(y.shape)
        weights[:, ::3] = 0
        masked = model.model.head.loss(hidden, y, weights)
    assert (total / y.numel()).item() == pytest.approx(base["loss"]["mean"], abs=2e-5)
    assert (masked / weights.sum()).item() == pytest.approx(base["loss"]["mean_every3rd_target_ignored"], abs=2e-5)


def test_bfloat16(new: Path) -> None:
    """As nanochat computes it on a GPU: every weight and the residual stream in bfloat16."""
    golden = json.loads((new / "golden_bf16.json").read_text())["base_d4_bf16"]
    model = nanoworks.load(new / "base" / "base_checkpoints" / "d4", device="cpu", dtype=torch.bfloat16)
    ids = fixed_tokens(1024, 3, 201, 1337)
    x, y = ids[:, :200], ids[:, 1:]
    with torch.no_grad():
        loss = model.model.head.loss(model.model(x, DenseContext(x)), y, torch.ones(y.shape)) / y.numel()
    assert loss.item() == pytest.approx(golden["loss"]["mean"], abs=1e-3)
    logits = model.logits(x)
    for place in golden["logits"]:
        row = logits[place["b"], place["pos"]]
        torch.testing.assert_close(row[:16], torch.tensor(place["first16"]), atol=0.1, rtol=0.0)


def test_a_window_of_one_key_less_would_be_seen(new: Path) -> None:
    model = nanoworks.load(new / "base" / "base_checkpoints" / "d4", device="cpu")
    for layer in list(model.model.layers)[:3]:
        assert layer.self_attn.window == Window(129)  # type: ignore[union-attr]
        layer.self_attn.window = Window(128)  # type: ignore[union-attr,assignment]
    logits = model.logits(fixed_tokens(1024, 3, 201, 1337)[:, :200])
    expected = torch.from_numpy(np.load(new / "tensors.npz")["base_d4.logits_b0"])
    difference = (logits[0, ::4] - expected).abs().amax(-1)
    assert difference[:32].max() <= 2e-5  # up to position 127 nothing is out of sight
    assert difference[33:].max() > 1e-3


def test_losses_of_fine_tuning_rows(golden: dict[str, Any], model: nanoworks.LoadedModel) -> None:
    """Its batches end in padding and mask what the user says (target -1)."""
    for (inputs, targets), expected in zip(golden["sft"]["train"], golden["sft"]["losses_base_d4"], strict=True):
        x, y = torch.tensor(inputs), torch.tensor(targets)
        supervised = (y >= 0).float()
        with torch.no_grad():
            loss = model.model.head.loss(model.model(x, DenseContext(x)), y.clamp(min=0), supervised)
        assert (loss / supervised.sum()).item() == pytest.approx(expected, abs=2e-5)


def test_bits_per_byte(new: Path, golden: dict[str, Any], model: nanoworks.LoadedModel) -> None:
    """nanochat's buffer of at least 1000 documents holds the 60 of the shard 17 times."""
    path = str(new / "base" / "base_data_climbmix")
    source = build_source("parquet", {"path": path, "validation": "last_file", "split": "val"})
    assert model.tokenizer is not None
    with Loader(source, model.tokenizer, sequence_length=256, batch_size=2, buffer=17 * 60, documents=False) as loader:
        batches = list(islice(loader, 8))
    token_bytes = model.tokenizer.token_bytes()
    assert token_bytes == golden["token_bytes"]["values"]
    four = bits_per_byte(model.model, batches[:4], token_bytes, "cpu")["bpb"]
    assert four == pytest.approx(golden["base_d4"]["bpb_val_4_batches_B2_T256"], abs=2e-6)
    eight = bits_per_byte(model.model, batches, token_bytes, "cpu")["bpb"]
    assert eight == pytest.approx(golden["checkpoint_meta"]["val_bpb"], abs=2e-6)


def test_figures(golden: dict[str, Any], model: nanoworks.LoadedModel) -> None:
    base = golden["base_d4"]
    assert model.model.num_parameters() == base["num_params"]["total"]
    assert model.model.flops_per_token(256) == base["flops_per_token"]
    assert isinstance(model.model, Nanochat2026)
    windows = [model.model.config.window(i) for i in range(4)]
    assert [[256 if w is None else w.size - 1, 0] for w in windows] == base["window_sizes"]


def test_initial_weights_are_nanochats(golden: dict[str, Any], model: nanoworks.LoadedModel) -> None:
    fresh = build_model(model.config)
    torch.manual_seed(42)
    fresh.init_weights()
    stats = golden["init_seed42_d4"]
    assert len(stats) == len(list(fresh.parameters()))
    for ours, theirs in _names(fresh):
        tensor, expected = fresh.get_parameter(ours).detach(), stats[theirs]
        assert tensor.double().norm().item() == pytest.approx(expected["norm"], rel=1e-6), theirs
        assert tensor.flatten()[:4].tolist() == pytest.approx(expected["first4"], rel=1e-6), theirs


def _names(model: Any) -> list[tuple[str, str]]:
    from nanoworks.checkpoint.keymap import KeyMap
    from nanoworks.models import ARCHITECTURES

    keymap = KeyMap(ARCHITECTURES.get("nanochat_2026").keymaps["nanochat"])
    return [(name, str(keymap.to_foreign(name))) for name, _ in model.named_parameters()]


def test_export_and_import_give_the_same_bytes(
    tmp_path: Path, new: Path, golden: dict[str, Any], model: nanoworks.LoadedModel
) -> None:
    export_nanochat(model.model, model.tokenizer, tmp_path / "d4", step=120)
    ours = torch.load(tmp_path / "d4" / "model_000120.pt", weights_only=True)
    theirs = torch.load(new / "base/base_checkpoints/d4/model_000120.pt", weights_only=True)
    assert ours.keys() == theirs.keys()
    assert all(ours[k].dtype == theirs[k].dtype and torch.equal(ours[k], theirs[k]) for k in theirs)
    config = json.loads((tmp_path / "d4" / "meta_000120.json").read_text())["model_config"]
    assert config == golden["checkpoint_meta"]["model_config"]
    again = nanoworks.load(tmp_path / "d4", device="cpu")
    assert again.config == model.config
    assert all(torch.equal(p, again.model.get_parameter(name)) for name, p in model.model.named_parameters())
    assert again.tokenizer is not None
    assert model.tokenizer is not None
    assert again.tokenizer.fingerprint == model.tokenizer.fingerprint


def test_our_own_directory_keeps_everything(tmp_path: Path, model: nanoworks.LoadedModel) -> None:
    with save_checkpoint(tmp_path / "step-000120", model.model, model.tokenizer, metadata={}):
        pass
    again = load_checkpoint(tmp_path / "step-000120")
    x = fixed_tokens(1024, 1, 200, 3)
    with torch.no_grad():
        expected = model.model(x, DenseContext(x))
        assert torch.equal(again.model(x, DenseContext(x)), expected)
    assert isinstance(again.model, Nanochat2026)
    assert again.model.config.window_pattern == "SSSL"


def test_a_vocabulary_that_is_no_multiple_of_64_comes_back_whole(tmp_path: Path) -> None:
    model = _tiny("nanochat_2026", vocab_size=70)
    export_nanochat(model, None, tmp_path / "d", step=1)
    state = torch.load(tmp_path / "d" / "model_000001.pt", weights_only=True)
    assert state["transformer.wte.weight"].shape == state["value_embeds.1.weight"].shape == (128, 32)
    again = load_checkpoint(tmp_path / "d")
    assert again.config == model.config
    assert all(torch.equal(p, again.model.get_parameter(name)) for name, p in model.named_parameters())


def test_padded_tables_of_december_2025_are_cut(tmp_path: Path) -> None:
    model = _tiny("nanochat", vocab_size=70)
    export_nanochat(model, None, tmp_path / "d", step=1)
    file = tmp_path / "d" / "model_000001.pt"
    state = torch.load(file, weights_only=True)
    for name in ("transformer.wte.weight", "lm_head.weight"):
        state[name] = torch.cat([state[name], torch.full((58, 32), 9.0)])
    torch.save(state, file)
    again = load_checkpoint(tmp_path / "d")
    assert all(torch.equal(p, again.model.get_parameter(name)) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"sliding_window": 7}, "sliding_window"), ({"rope_theta": 5000.0}, "rope_theta"), ({"head_dim": 16}, "head_dim")],
)
def test_what_the_format_cannot_say_is_not_exported(tmp_path: Path, changes: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=f"no place for {key}"):
        export_nanochat(_tiny("nanochat_2026", **changes), None, tmp_path / "d")


def _tiny(family: str, **changes: Any) -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model = build_model(config_from_dict({"model_type": family, "vocab_size": 64, **sizes, **changes}))
    model.init_weights()
    return model


def _gate(channels: int) -> dict[str, Tensor]:
    return {
        "transformer.h.1.attn.ve_gate.weight": torch.zeros(2, channels),
        "value_embeds.1.weight": torch.zeros(64, 32),
    }


A = {"transformer.wte.weight": torch.zeros(64, 32)}
B = {**A, "resid_lambdas": torch.ones(2), "x0_lambdas": torch.zeros(2)}
ERAS = [
    (B, "2026-01-11"),
    ({**B, **_gate(32)}, "2026-01-16"),
    ({**B, **_gate(32), "bigram_embed.weight": torch.zeros(64, 32)}, "2026-01-25"),
    ({**B, **_gate(12)}, "2026-03-09"),
]


@pytest.mark.parametrize(("state", "name"), ERAS, ids=[name for _, name in ERAS])
def test_eras_in_between_are_refused_by_name(tmp_path: Path, state: dict[str, Tensor], name: str) -> None:
    assert era_of(state).family is None
    torch.save(state, tmp_path / "model_000001.pt")
    (tmp_path / "meta_000001.json").write_text(json.dumps({"model_config": {}}))
    with pytest.raises(UserError, match=name):
        load_checkpoint(tmp_path)


def test_eras_that_are_read() -> None:
    assert era_of(A).family == "nanochat"
    assert era_of({**B, **_gate(12), "smear_gate.weight": torch.zeros(1, 24)}).family == "nanochat_2026"
