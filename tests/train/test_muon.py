"""Newton-Schulz against nanochat's figures, and Muon stacked against Muon one matrix at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from nanoworks.train import muon
from nanoworks.train.muon import Muon, newton_schulz

# rows, columns, norm, sum, first 4 elements; from the real nanochat (885a4f2)
GOLDENS = [
    (8, 8, 2.3005152, -3.4626465, [0.4296875, 0.14257812, 0.640625, -0.12109375]),
    (16, 4, 1.8634466, -3.3312988, [0.30859375, 0.16894531, 0.296875, -0.01953125]),
    (4, 16, 1.7006674, -2.2327881, [0.31640625, 0.043212891, 0.328125, -0.11523438]),
    (32, 96, 4.6478489, -2.3321228, [0.125, -0.028564453, 0.109375, -0.10839844]),
    (96, 32, 4.6686668, -2.9472504, [0.13476562, 0.012084961, 0.078125, -0.0048828125]),
]


def golden_input(rows: int, columns: int) -> Tensor:
    values, x = [], 5
    for _ in range(rows * columns):
        x = (1103515245 * x + 12345) % 2**31
        values.append((x >> 8) % 2000 / 1000 - 1)
    return torch.tensor(values).view(1, rows, columns)


@pytest.mark.parametrize(("rows", "columns", "norm", "total", "first"), GOLDENS)
def test_newton_schulz_is_nanochats(rows: int, columns: int, norm: float, total: float, first: list[float]) -> None:
    out = newton_schulz(golden_input(rows, columns)).double()
    # The last bits of a bfloat16 product depend on the processor's kernel.
    assert out.norm().item() == pytest.approx(norm, rel=1e-2)
    assert out.sum().item() == pytest.approx(total, rel=2e-2)
    assert out.flatten()[:4].tolist() == pytest.approx(first, abs=1e-2)


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 96, 32), (2, 32, 96)])
def test_singular_values_end_near_one(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(newton_schulz(torch.randn(shape)).float())
    assert values.max() < 1.3
    assert values.quantile(0.1) > 0.5


def matrices(seed: int = 0) -> list[tuple[str, Parameter]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(8, 8), (16, 4), (8, 8), (4, 16), (8, 8)]
    return [(f"m{i}", Parameter(torch.randn(s, generator=generator))) for i, s in enumerate(shapes)]


def train(parameters: list[tuple[str, Parameter]], steps: int = 3) -> dict[str, Tensor]:
    optimizer = Muon(parameters)
    for step in range(steps):
        for i, (_, p) in enumerate(parameters):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
        optimizer.step(lr=0.1, momentum=0.9)
    return optimizer.momentum()


@pytest.mark.parametrize("largest_stack", [2**26, 128, 1])
def test_a_stack_equals_one_matrix_at_a_time(monkeypatch: pytest.MonkeyPatch, largest_stack: int) -> None:
    monkeypatch.setattr(muon, "_MAX_STACK", largest_stack)
    together = matrices()
    momentum = train(together)
    for i, (name, p) in enumerate(matrices()):
        buffer = torch.zeros_like(p)
        for step in range(3):
            grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
            buffer = 0.9 * buffer + 0.1 * grad
            update = newton_schulz((0.1 * grad + 0.9 * buffer)[None])[0]
            p.data -= 0.1 * max(1, p.size(0) / p.size(1)) ** 0.5 * update
        torch.testing.assert_close(momentum[name], buffer)
        torch.testing.assert_close(together[i][1].detach(), p.detach(), rtol=0, atol=5e-3)


def test_no_gradient_counts_as_zero() -> None:
    a, b = matrices(), matrices()
    b[0][1].grad = torch.zeros(8, 8)
    for parameters in (a, b):
        parameters[2][1].grad = torch.ones(8, 8)
        Muon(parameters).step(lr=0.1, momentum=0.9)
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(a, b, strict=True))


def test_zero_gradients_stay_finite() -> None:
    parameters = matrices()
    before = [p.detach().clone() for _, p in parameters]
    for _, p in parameters:
        p.grad = torch.zeros_like(p)
    Muon(parameters).step(lr=0.1, momentum=0.9)
    assert all(torch.equal(p, old) for (_, p), old in zip(parameters, before, strict=True))
