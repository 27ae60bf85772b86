"""The optimizer of 2026: its rules for every role, exact resume, what caution means, and the depth dial."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import Parameter

from nanoworks.config import load_recipe
from nanoworks.config.load import recipes_dir
from nanoworks.models import Decoder, build_model, config_from_dict
from nanoworks.models.nanochat_2026 import Nanochat2026Config
from nanoworks.train import depth_dial
from nanoworks.train.muon_2026 import MuonAdamW2026, NorMuon, polar_express
from nanoworks.train.optim import OPTIMIZERS, Optimizer
from nanoworks.train.schedule import Trapezoid

STEPS = 8


def tiny(model_type: str = "nanochat_2026") -> Decoder:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    extra = {"intermediate_size": 48, "max_position_embeddings": 64} if model_type == "llama" else {}
    model = build_model(config_from_dict({"model_type": model_type, **sizes, **extra}))
    model.init_weights()
    return model


def build(model: Decoder, **options: Any) -> MuonAdamW2026:
    optimizer = MuonAdamW2026(model.param_groups(), MuonAdamW2026.Options(**options))
    optimizer.total_steps = STEPS
    return optimizer


def train(optimizer: Optimizer, model: Decoder, steps: range) -> None:
    for step in steps:
        for i, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * step + i))
        optimizer.step(0.5, step)
        optimizer.zero_grad()


def test_resume_is_bit_exact(tmp_path: Path) -> None:
    straight = tiny()
    train(build(straight), straight, range(6))
    first = tiny()
    optimizer = build(first)
    train(optimizer, first, range(3))
    assert all(p.grad is None for p in first.parameters())
    save_file(optimizer.state_dict(), tmp_path / "state.safetensors")
    second = tiny()
    second.load_state_dict(first.state_dict())
    optimizer = build(second)
    optimizer.load_state_dict(load_file(tmp_path / "state.safetensors"))
    train(optimizer, second, range(3, 6))
    for name, p in second.named_parameters():
        assert torch.equal(p, straight.get_parameter(name)), name


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("model_type", ["nanochat_2026", "nanochat", "llama"])
def test_every_optimizer_trains_every_kind_of_role(name: str, model_type: str) -> None:
    model, before = tiny(model_type), tiny(model_type)
    optimizer = OPTIMIZERS.get(name)(model.param_groups(), OPTIMIZERS.options(name)())
    optimizer.total_steps = STEPS
    train(optimizer, model, range(1))
    for key, p in model.named_parameters():
        assert not torch.equal(p, before.get_parameter(key)), key
    assert optimizer.lrs["matrix"] > 0


def test_an_optimizer_without_a_rule_for_a_part_takes_the_one_for_the_whole() -> None:
    lrs = OPTIMIZERS.get("muon_adamw")(tiny().param_groups(), OPTIMIZERS.options("muon_adamw")()).lrs
    assert lrs["embedding.value"] == lrs["embedding"]
    assert lrs["other.skip"] == lrs["other.smear"]


def test_the_length_of_the_run_must_be_known() -> None:
    model = tiny()
    optimizer = MuonAdamW2026(model.param_groups(), MuonAdamW2026.Options())
    with pytest.raises(AssertionError, match="total_steps"):
        optimizer.step(1.0, 0)


@pytest.mark.parametrize("shape", [(2, 8, 8), (2, 24, 6), (2, 6, 24)])
def test_polar_express_brings_singular_values_to_one(shape: tuple[int, int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(polar_express(x))
    assert values.min() > 0.7
    assert values.max() < 1.2
    assert torch.equal(polar_express(torch.zeros(shape)), torch.zeros(shape))


def test_bfloat16_is_close_to_float32() -> None:
    updates = []
    for dtype in (torch.float32, torch.bfloat16):
        p = Parameter(torch.zeros(24, 32))
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
        NorMuon([("p", p)], beta2=0.9, dtype=dtype).step(1.0, 0.9)
        updates.append(p.detach())
    assert (updates[0] - updates[1]).norm() < 0.1 * updates[0].norm()


def test_the_update_has_the_norm_of_a_semi_orthogonal_matrix() -> None:
    p = Parameter(torch.zeros(32, 8))
    for _ in range(3):
        before = p.detach().clone()
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * 1e-3
        muon = NorMuon([("p", p)], beta2=0.9, dtype=torch.float32)
        muon.step(0.1, 0.9)
        # 0.1, times sqrt(32 / 8) for a tall matrix, times sqrt(8): every direction once
        assert (p.detach() - before).norm().item() == pytest.approx(0.1 * 2 * 8**0.5, rel=1e-5)


def test_decay_touches_only_what_the_update_moves_towards_zero() -> None:
    start = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    moved = {}
    for decay in (0.0, 0.5):
        p = Parameter(start.clone())
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        NorMuon([("p", p)], beta2=0.9, dtype=torch.float32).step(0.1, 0.9, decay)
        moved[decay] = p.detach()
    towards_zero = (start - moved[0.0]) * start >= 0
    decayed = moved[0.0] - 0.1 * 0.5 * start
    torch.testing.assert_close(moved[0.5], torch.where(towards_zero, decayed, moved[0.0]))
    assert 0 < towards_zero.sum() < 64


def test_a_parameter_without_gradient_only_decays() -> None:
    p = Parameter(torch.ones(4, 4))
    NorMuon([("p", p)], beta2=0.9, dtype=torch.float32).step(0.1, 0.9, 0.5)
    torch.testing.assert_close(p.detach(), torch.full((4, 4), 0.95))


def test_the_dial_is_nanochats_at_every_depth(shared_dir: Path) -> None:
    for line in (shared_dir / "golden/nanochat/new/hyperparams.jsonl").read_text().splitlines():
        golden = json.loads(line)
        config = config_from_dict(
            {"model_type": "nanochat_2026", "depth": golden["depth"], "vocab_size": golden["vocab"]}
        )
        assert isinstance(config, Nanochat2026Config)
        dial = depth_dial.depth_dial(config)
        assert dial["train"]["tokens_per_step"] == golden["total_batch_size"]
        tokens = int(dial["train"]["length"].removesuffix(" tokens"))
        assert tokens == golden["target_tokens"]
        assert tokens // dial["train"]["tokens_per_step"] == golden["num_iterations"]
        with torch.device("meta"):
            groups = build_model(config).param_groups()
        optimizer = MuonAdamW2026(groups, MuonAdamW2026.Options(**dial["optim"], polar_dtype="float32"))
        order = ("unembedding", "embedding", "embedding.value", "other.residual", "other.skip", "other.smear", "matrix")
        assert [optimizer.lrs[role] for role in order] == pytest.approx([g["lr"] for g in golden["groups"][:7]])
        for mine in optimizer._adamw.param_groups:
            theirs = golden["groups"][order.index(mine["role"])]
            assert [*mine["betas"], mine["eps"], mine["weight_decay"]] == [
                *theirs["betas"],
                theirs["eps"],
                theirs["weight_decay"],
            ]
        assert dial["optim"]["weight_decay"] == pytest.approx(golden["groups"][6]["weight_decay"])


def test_the_recipe_is_the_dials() -> None:
    recipe = load_recipe(recipes_dir() / "pretrain" / "nanochat_2026.yaml", [], environ={})
    assert recipe.model is not None
    config = config_from_dict({**recipe.model, "vocab_size": 32768})
    assert isinstance(config, Nanochat2026Config)
    dial = depth_dial.depth_dial(config)
    assert dial["train"] == {"length": recipe.train.length, "tokens_per_step": recipe.train.tokens_per_step}
    assert {key: recipe.optim.options[key] for key in dial["optim"]} == pytest.approx(dial["optim"], rel=1e-4)


def test_the_dial_prints_a_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["depth_dial", "4", "--vocab-size", "1024"])
    depth_dial.main()
    (tmp_path / "d4.yaml").write_text(capsys.readouterr().out)
    recipe = load_recipe(tmp_path / "d4.yaml", [], environ={})
    assert recipe.model == {"model_type": "nanochat_2026", "depth": 4}
    assert recipe.optim.name == "muon_adamw_2026"
    # A vocabulary of 1024 leaves little to train, so the batch shrinks and the decay grows.
    assert recipe.train.tokens_per_step < 2**19
    assert recipe.optim.options["weight_decay"] > 0.28
    assert isinstance(Trapezoid.Options(**recipe.schedule.options), Trapezoid.Options)
