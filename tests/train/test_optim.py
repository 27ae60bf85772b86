"""Both optimizers: roles and rates, exact resume, refusal of a foreign state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import Parameter

from nanoworks.common.errors import UserError
from nanoworks.train.optim import OPTIMIZERS, AdamW, MuonAdamW, Optimizer

Groups = dict[str, list[tuple[str, Parameter]]]
NAMES = ["adamw", "muon_adamw"]


def groups(seed: int = 0) -> Groups:
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "matrix": {"layers.0.fc1.weight": (16, 4), "layers.0.fc2.weight": (4, 16), "layers.1.fc1.weight": (16, 4)},
        "embedding": {"embed.weight": (10, 4)},
        "unembedding": {"head.weight": (10, 4)},
        "other": {"norm.weight": (4,)},
    }
    return {
        role: [(name, Parameter(torch.randn(shape, generator=generator))) for name, shape in members.items()]
        for role, members in shapes.items()
    }


def parameters(of: Groups) -> dict[str, Parameter]:
    return {name: p for members in of.values() for name, p in members}


def build(name: str, of: Groups, **options: Any) -> Optimizer:
    return OPTIMIZERS.get(name)(of, OPTIMIZERS.options(name)(**options))


def train(optimizer: Optimizer, of: Groups, steps: range) -> None:
    for step in steps:
        for i, p in enumerate(parameters(of).values()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * step + i))
        optimizer.step(0.5, step)
        optimizer.zero_grad()


@pytest.mark.parametrize("name", NAMES)
def test_resume_is_bit_exact(name: str, tmp_path: Path) -> None:
    straight = groups()
    train(build(name, straight), straight, range(6))

    first = groups()
    optimizer = build(name, first)
    train(optimizer, first, range(3))
    save_file(optimizer.state_dict(), tmp_path / "state.safetensors")
    second = groups(seed=1)
    for key, p in parameters(second).items():
        p.data.copy_(parameters(first)[key].data)
    optimizer = build(name, second)
    optimizer.load_state_dict(load_file(tmp_path / "state.safetensors"))
    train(optimizer, second, range(3, 6))

    assert all(torch.equal(p, parameters(straight)[key]) for key, p in parameters(second).items())


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_moves_and_zero_grad_drops_gradients(name: str) -> None:
    trained, untouched = groups(), parameters(groups())
    train(build(name, trained), trained, range(1))
    for key, p in parameters(trained).items():
        assert not torch.equal(p, untouched[key]), key
        assert p.grad is None


def test_a_state_of_other_parameters_is_refused() -> None:
    optimizer = build("muon_adamw", groups())
    state = optimizer.state_dict()
    with pytest.raises(UserError, match=r"embed\.weight\.exp_avg"):
        build("adamw", groups()).load_state_dict({k: v for k, v in state.items() if not k.startswith("embed")})
    state["embed.weight.exp_avg"] = torch.zeros(11, 4)
    with pytest.raises(UserError, match=r"1 tensors differ, the first is 'embed\.weight\.exp_avg'"):
        optimizer.load_state_dict(state)


def test_rates_of_muon_adamw() -> None:
    wide = {**groups(), "embedding": [("embed.weight", Parameter(torch.zeros(2, 3072)))]}
    optimizer = build("muon_adamw", wide, lr_fraction=0.1)
    expected = {"matrix": 0.002, "embedding": 0.01, "unembedding": 0.0002, "other": 0.0002}
    assert optimizer.lrs == pytest.approx(expected)
    unscaled = build("muon_adamw", wide, scale_lr_by_width=False)
    assert unscaled.lrs == pytest.approx({"matrix": 0.02, "embedding": 0.2, "unembedding": 0.004, "other": 0.004})


@pytest.mark.parametrize(("name", "decaying"), [("adamw", {"layers"}), ("muon_adamw", {"embed", "head"})])
def test_weight_decay_touches_only_its_roles(name: str, decaying: set[str]) -> None:
    plain, decayed = groups(), groups()
    train(build(name, plain, weight_decay=0.0), plain, range(1))
    train(build(name, decayed, weight_decay=0.1), decayed, range(1))
    changed = {k.split(".")[0] for k, p in parameters(plain).items() if not torch.equal(p, parameters(decayed)[k])}
    assert changed == decaying


def test_lr_scale_scales_every_rule() -> None:
    for name in NAMES:
        still, before = groups(), parameters(groups())
        for p in parameters(still).values():
            p.grad = torch.ones_like(p)
        build(name, still).step(0.0, 0)
        assert all(torch.equal(p, before[key]) for key, p in parameters(still).items())


def test_momentum_warms_up_with_the_step() -> None:
    """The momentum buffer after one step from zero is (1 - momentum) * gradient."""
    for step, momentum in ((0, 0.85), (150, 0.9), (1000, 0.95)):
        members = groups()
        for p in parameters(members).values():
            p.grad = torch.ones_like(p)
        optimizer = build("muon_adamw", members)
        optimizer.step(1.0, step)
        buffer = optimizer.state_dict()["layers.0.fc1.weight.momentum"]
        torch.testing.assert_close(buffer, torch.full((16, 4), 1 - momentum))


def test_adamw_is_torchs() -> None:
    ours, theirs = groups(), groups()
    train(AdamW(ours, AdamW.Options(lr=0.1, weight_decay=0.0)), ours, range(3))
    reference = torch.optim.AdamW(parameters(theirs).values(), lr=0.05, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(3):
        for i, p in enumerate(parameters(theirs).values()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * step + i))
        reference.step()
    for key, p in parameters(ours).items():
        torch.testing.assert_close(p, parameters(theirs)[key])


def test_options_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        MuonAdamW.Options(lr_matrix=0)
