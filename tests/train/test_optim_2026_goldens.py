"""Schedules, single updates and three optimizer steps against the real nanochat's (92d63d4)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import nanoworks
from nanoworks.checkpoint.keymap import KeyMap
from nanoworks.models import ARCHITECTURES, Decoder, build_model, config_from_dict
from nanoworks.nn.context import DenseContext
from nanoworks.train.muon_2026 import MuonAdamW2026, NorMuon, momentum_at, weight_decay_at
from nanoworks.train.schedule import Trapezoid

ROWS, LENGTH, VOCAB, TOTAL = 4, 64, 1024, 100
KEYMAP = KeyMap(ARCHITECTURES.get("nanochat_2026").keymaps["nanochat"])


@pytest.fixture(scope="module")
def new(shared_dir: Path) -> Path:
    return shared_dir / "golden" / "nanochat" / "new"


@pytest.fixture(scope="module")
def golden(new: Path) -> dict[str, Any]:
    return json.loads((new / "golden.json").read_text())


def fixed_tokens(vocab: int, rows: int, columns: int, seed: int) -> Tensor:
    ids, x = [], seed
    for _ in range(rows * columns):
        x = (1103515245 * x + 12345) % 2**31
        ids.append((x >> 8) % (vocab - 9))
    return torch.tensor(ids).view(rows, columns)


def same(tensor: Tensor, stats: dict[str, Any], *, norm: float, entry: float) -> None:
    """`norm` and `entry`: largest absolute error of the norm, and of the first and last entries."""
    assert list(tensor.shape) == stats["shape"]
    assert abs(tensor.double().norm().item() - stats["norm"]) <= norm
    ends = [*tensor.flatten()[:4].tolist(), *tensor.flatten()[-4:].tolist()]
    assert ends == pytest.approx(stats["first4"] + stats["last4"], abs=entry)


def test_schedules(golden: dict[str, Any]) -> None:
    assert len(golden["base_schedule"]) == 3
    for case in golden["base_schedule"]:
        total = case["num_iterations"]
        schedule = Trapezoid(
            Trapezoid.Options(
                warmup_steps=case["warmup_steps"],
                warmdown_ratio=case["warmdown_ratio"],
                final_lr_fraction=case["final_lr_frac"],
            )
        )
        options = MuonAdamW2026.Options(momentum_warmdown_ratio=case["warmdown_ratio"])
        # A warmup that reaches into the warmdown ends where the warmdown has got to.
        assert [schedule(i, total) for i in case["it"]] == pytest.approx(case["lrm"], abs=1e-12)
        momenta = [momentum_at(i, total, options) for i in case["it"]]
        assert momenta == pytest.approx(case["muon_momentum"], abs=1e-12)
        decays = [weight_decay_at(i, total, options) for i in case["it"]]
        assert decays == pytest.approx(case["weight_decay(0.28)"], abs=1e-12)


def test_single_updates_of_muon(golden: dict[str, Any]) -> None:
    def matrix(rows: int, cols: int, seed: int) -> Tensor:
        return fixed_tokens(2009, rows, cols, seed) / 1000 - 1

    assert len(golden["muon_step_fused"]) == 5
    for case in golden["muon_step_fused"]:
        shape = rows, cols = case["rows"], case["cols"]
        parameters = [Parameter(matrix(*shape, seed)) for seed in (7, 8)]
        muon = NorMuon([("a", parameters[0]), ("b", parameters[1])], beta2=0.9, dtype=torch.float32)
        for expected in case["params_after"]:
            for p, seed in zip(parameters, (5, 6), strict=True):
                p.grad = matrix(*shape, seed)
            muon.step(0.02 / max(1.0, rows / cols) ** 0.5, 0.9, 0.1)  # the figures are without the factor of the shape
            same(torch.stack([p.detach() for p in parameters]), expected, norm=1e-5, entry=1e-6)
        same(torch.stack(list(muon.momentum().values())), case["momentum_buffer"], norm=1e-5, entry=1e-7)
        same(torch.stack(list(muon.squares().values())), case["second_momentum_buffer"], norm=1e-6, entry=1e-7)


def steps(model: Decoder, golden: dict[str, Any], weight_decay: float) -> MuonAdamW2026:
    # The golden data was made with the defaults of nanochat's function, not those of its command line.
    options = MuonAdamW2026.Options(lr_embedding=0.2, lr_unembedding=0.004, weight_decay=weight_decay)
    optimizer = MuonAdamW2026(model.param_groups(), options)
    optimizer.total_steps = TOTAL
    matrices = {name for name, _ in model.param_groups()["matrix"]}
    noise = {name for name, stats in golden["steps"][0]["raw_grads"].items() if 0 < stats["norm"] < 1e-8}
    ids = fixed_tokens(VOCAB, ROWS, LENGTH + 1, 99)
    for i, expected in enumerate(golden["steps"]):
        optimizer.zero_grad()
        for rows in ids.split(2):
            x, y = rows[:, :-1], rows[:, 1:]
            loss = model.head.loss(model(x, DenseContext(x)), y, torch.ones(y.shape)) / y.numel()
            (loss / 2).backward()
        assert loss.item() == pytest.approx(expected["loss_last_microbatch"], abs=2e-5)
        for name, stats in (expected["raw_grads"] or {}).items():
            grad = _parameter(model, name).grad
            assert grad is not None
            assert grad.double().norm().item() == pytest.approx(stats["norm"], rel=1e-4, abs=1e-8), name
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step(expected["lr_mult"], i)
        assert momentum_at(i, TOTAL, options) == pytest.approx(expected["muon_momentum"])
        assert weight_decay_at(i, TOTAL, options) == pytest.approx(expected["muon_weight_decay"])
        for name, p in model.named_parameters():
            foreign = str(KEYMAP.to_foreign(name))
            if foreign in noise:
                # A rounding error that stands for a gradient of zero, and of which Adam makes a whole step.
                p.data.copy_(torch.tensor(expected["params"][foreign]["first4"]))
                continue
            update = (p.detach() - before[name]).double().norm().item()
            stats = expected["params"][foreign]
            norm = 2e-3 * update + 1e-6 * stats["norm"] if name in matrices else 1e-5 * stats["norm"]
            same(p.detach(), stats, norm=norm, entry=2e-3 * update / p.numel() ** 0.5 + 1e-6)
    return optimizer


def _parameter(model: Decoder, foreign: str) -> Parameter:
    place = KEYMAP.to_ours(foreign)
    assert place is not None
    return model.get_parameter(place.name)


def test_from_the_initial_weights(golden: dict[str, Any]) -> None:
    sizes = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3, "max_position_embeddings": 256}
    model = build_model(config_from_dict({"model_type": "nanochat_2026", "vocab_size": VOCAB, **sizes}))
    torch.manual_seed(42)
    model.init_weights()
    steps(model, golden["optim_from_init_seed42"], 0.0)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_from_a_checkpoint(new: Path, golden: dict[str, Any], weight_decay: float) -> None:
    expected = golden[f"optim_from_checkpoint_wd{weight_decay or 0}"]
    model = nanoworks.load(new / "base" / "base_checkpoints" / "d4", device="cpu").model
    model.train().requires_grad_(True)
    state = steps(model, expected, weight_decay).state_dict()
    groups = [group["params"] for group in expected["param_groups"] if group["kind"] == "muon"]
    assert len(groups) == 4
    for names in groups:
        ours = [str(KEYMAP.to_ours(name).name) for name in names]  # type: ignore[union-attr]
        for what, theirs in (("momentum", "momentum_buffer"), ("mean_square", "second_momentum_buffer")):
            stats = expected["state"][names[0]][theirs]
            stacked = torch.stack([state[f"{name}.{what}"] for name in ours])
            same(stacked, stats, norm=1e-4 * stats["norm"], entry=1e-3 * stats["absmax"])
    for name, p in model.named_parameters():
        stats = expected["state"].get(KEYMAP.to_foreign(name), {})
        if "exp_avg" in stats:
            assert state[f"{name}.step"] == stats["step"] == 3
            for what in ("exp_avg", "exp_avg_sq"):
                assert state[f"{name}.{what}"].shape == p.shape
                assert state[f"{name}.{what}"].double().norm().item() == pytest.approx(stats[what]["norm"], rel=1e-4)
