"""Three optimizer steps against the real nanochat's (885a4f2): losses, gradient norms, every parameter.

`tests/data/nanochat_old/optim_from_init_seed42.json` is a part of the figures in ../shared/golden/nanochat/old.
Two micro-batches of two rows of 64 tokens, gradients clipped at 1, all learning rates at their defaults.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import nanoworks
from nanoworks.checkpoint.keymap import KeyMap
from nanoworks.models import ARCHITECTURES, Decoder, build_model, config_from_dict
from nanoworks.nn.context import DenseContext
from nanoworks.parallel import SingleDevice
from nanoworks.train.optim import MuonAdamW

ROWS, LENGTH, VOCAB = 4, 64, 1024
KEYMAP = KeyMap(ARCHITECTURES.get("nanochat").keymaps["nanochat"])


def fixed_tokens() -> Tensor:
    ids, x = [], 99
    for _ in range(ROWS * (LENGTH + 1)):
        x = (1103515245 * x + 12345) % 2**31
        ids.append((x >> 8) % (VOCAB - 9))
    return torch.tensor(ids).view(ROWS, LENGTH + 1)


def backward(model: Decoder, rows: Tensor) -> float:
    x, y = rows[:, :-1], rows[:, 1:]
    loss = model.head.loss(model(x, DenseContext(x)), y, torch.ones(y.shape)) / y.numel()
    (loss / 2).backward()
    return loss.item()


def check(model: Decoder, steps: list[dict[str, Any]], weight_decay: float = 0.0) -> MuonAdamW:
    optimizer = MuonAdamW(model.param_groups(), MuonAdamW.Options(weight_decay=weight_decay))
    matrices = {name for name, _ in model.param_groups()["matrix"]}
    ids = fixed_tokens()
    for i, expected in enumerate(steps):
        optimizer.zero_grad()
        loss = [backward(model, rows) for rows in ids.split(2)][-1]
        # Muon rounds to bfloat16, so the runs drift apart by its last bits after the first step.
        assert loss == pytest.approx(expected["loss"], abs=2e-5 if i == 0 else 5e-4)
        norm = SingleDevice(torch.device("cpu")).clip(model, 1.0)
        assert norm == pytest.approx(expected["grad_norm"], rel=1e-5 if i == 0 else 1e-3)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step(1.0, i)
        for name, p in model.named_parameters():
            stats = expected["params"][KEYMAP.to_foreign(name)]
            update = (p.detach() - before[name]).double().norm().item()
            norm_error = abs(p.detach().double().norm().item() - stats["norm"])
            if name in matrices:
                assert norm_error <= 2e-3 * update + 1e-6 * stats["norm"], name
            else:
                assert norm_error <= 1e-5 * stats["norm"], name
            ends = p.detach().flatten()[[0, 1, 2, 3, -4, -3, -2, -1]].tolist()
            typical = update / p.numel() ** 0.5
            assert ends == pytest.approx(stats["first4"] + stats["last4"], abs=0.5 * typical + 1e-6), name
    return optimizer


def test_from_the_initial_weights(data_dir: Path) -> None:
    model = build_model(config_from_dict({"model_type": "nanochat", "depth": 2, "vocab_size": VOCAB}))
    torch.manual_seed(42)
    model.init_weights()
    check(model, json.loads((data_dir / "nanochat_old" / "optim_from_init_seed42.json").read_text()))


@pytest.mark.parametrize(("key", "weight_decay"), [("", 0.0), ("_wd0.1", 0.1)])
def test_from_a_checkpoint(shared_dir: Path, key: str, weight_decay: float) -> None:
    old = shared_dir / "golden" / "nanochat" / "old"
    golden = json.loads((old / "golden.json").read_text())[f"optim_from_checkpoint{key}"]
    for step in golden["steps"]:
        step.update(loss=step["loss_last_microbatch"], grad_norm=step["grad_norm_before_clip"])
    model = nanoworks.load(old / "base" / "base_checkpoints" / "d2", device="cpu").model
    model.train().requires_grad_(True)
    state = check(model, golden["steps"], weight_decay).state_dict()
    for name, p in model.named_parameters():
        foreign = KEYMAP.to_foreign(name)
        if foreign in golden["muon_state"]:
            ours = {"momentum_buffer": state[f"{name}.momentum"]}
        else:
            ours = {what: state[f"{name}.{what}"] for what in ("exp_avg", "exp_avg_sq")}
            assert state[f"{name}.step"] == 3
        theirs = golden["muon_state"].get(foreign) or golden["adamw_state"][foreign]
        for what, tensor in ours.items():
            assert tensor.shape == p.shape
            assert tensor.double().norm().item() == pytest.approx(theirs[what]["norm"], rel=1e-3)
