"""The fast CPU paths against PyTorch in float64, which the same functions fall back to for that dtype."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanoworks.nn import blocked_attention, onednn
from nanoworks.nn import functional as NF

Inputs = dict[str, Tensor]

CASES: dict[str, tuple[Callable[..., Tensor], dict[str, tuple[int, ...]]]] = {
    "linear": (NF.linear, {"x": (2, 50, 16), "weight": (24, 16)}),
    "linear, narrow": (NF.linear, {"x": (20, 16), "weight": (3, 16)}),
    "linear, one token": (NF.linear, {"x": (16,), "weight": (3, 16)}),
    "linear, bias": (NF.linear, {"x": (2, 50, 16), "weight": (24, 16), "bias": (24,)}),
    "linear_group": (
        lambda x, q, k: torch.cat(NF.linear_group(x, [q, k]), -1),
        {"x": (2, 50, 16), "q": (12, 16), "k": (4, 16)},
    ),
    "rms_norm": (lambda x: NF.rms_norm(x, None, 1e-6), {"x": (2, 5, 3, 16)}),
    "rms_norm, weight": (lambda x, w: NF.rms_norm(x, w, 1e-6), {"x": (2, 5, 16), "w": (16,)}),
    "relu_squared": (NF.relu_squared, {"x": (2, 5, 16)}),
    "apply_rope": (
        lambda x: NF.apply_rope(x, torch.linspace(-1, 1, 40).view(5, 8), torch.linspace(1, -2, 40).view(5, 8)),
        {"x": (2, 5, 3, 16)},
    ),
    "causal_attention": (
        NF.causal_attention,
        {"q": (2, 300, 2, 96), "k": (2, 300, 2, 96), "v": (2, 300, 2, 96)},
    ),
    "causal_attention, grouped": (
        lambda q, k, v: NF.causal_attention(q, k, v, scale=0.3),
        {"q": (1, 257, 4, 96), "k": (1, 257, 2, 96), "v": (1, 257, 2, 96)},
    ),
}


def run(function: Callable[..., Tensor], inputs: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """The result and the gradient of each input, in float64."""
    leaves = {name: t.to(dtype).requires_grad_() for name, t in inputs.items()}
    y = function(**leaves)
    assert y.dtype == dtype
    upstream = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(dtype)
    return [t.detach().double() for t in (y, *torch.autograd.grad(y, list(leaves.values()), upstream))]


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Callable[..., Tensor], Inputs]:
    function, shapes = CASES[request.param]
    generator = torch.Generator().manual_seed(0)
    # Values that bfloat16 holds exactly, so that every dtype starts from the same numbers.
    inputs = {name: torch.randn(s, generator=generator).bfloat16() for name, s in shapes.items()}
    return function, inputs


def test_float32_equals_float64(case: tuple[Callable[..., Tensor], Inputs]) -> None:
    for ours, exact in zip(run(*case, torch.float32), run(*case, torch.float64), strict=True):
        assert relative_error(ours, exact) < 2e-6


def test_bfloat16_is_as_near_as_pytorch(
    case: tuple[Callable[..., Tensor], Inputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, exact = run(*case, torch.bfloat16), run(*case, torch.float64)
    monkeypatch.setattr(onednn, "plain_cpu", lambda *tensors: False)
    theirs = run(*case, torch.bfloat16)
    for a, b, reference in zip(ours, theirs, exact, strict=True):
        assert relative_error(a, reference) < 2.5 * relative_error(b, reference) + 1e-3


@pytest.mark.parametrize(
    ("call", "node"),
    [
        (lambda x: NF.linear(x, x[:, 0]), "_Linear"),
        (lambda x: NF.linear_group(x, [x[:, 0], x[:, 0]])[0], "_LinearGroup"),
        (lambda x: NF.rms_norm(x, None, 1e-6), "_RMSNorm"),
        (NF.relu_squared, "_ReLUSquared"),
        (lambda x: NF.causal_attention(*[x.bfloat16()[None]] * 3), "_CausalAttention"),
        (lambda x: NF.causal_attention(*[x.view(1, 20, 1, 4).repeat(1, 13, 1, 24)] * 3), "_CausalAttention"),
    ],
)
def test_the_fast_path_is_taken(call: Callable[[Tensor], Tensor], node: str) -> None:
    if not onednn.works():
        pytest.skip("this PyTorch has no oneDNN product")
    grad_fn = call(torch.randn(20, 1, 4, requires_grad=True)).grad_fn
    assert type(grad_fn).__name__ == f"{node}Backward"


def test_a_strided_weight_is_copied_first() -> None:
    x, weight = torch.randn(30, 8), torch.randn(5, 16)[:, ::2]
    torch.testing.assert_close(NF.linear(x, weight), x @ weight.t())


def test_frozen_operands_get_no_gradient() -> None:
    x, q, k = torch.randn(30, 8), torch.randn(5, 8), torch.randn(2, 8)
    y = NF.linear(x.requires_grad_(), q)
    (y.sum() + sum(p.sum() for p in NF.linear_group(x, [q, k]))).backward()
    torch.testing.assert_close(x.grad, (2 * q.sum(0) + k.sum(0)).expand(30, 8))
    assert q.grad is None


def test_autocast_decides_the_dtype() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert NF.linear(torch.ones(2, 4), torch.ones(3, 4)).dtype == torch.bfloat16


def test_subclasses_go_to_pytorch() -> None:
    class Marked(Tensor):
        pass

    weight = torch.ones(3, 4).as_subclass(Marked)
    assert isinstance(NF.linear(torch.ones(2, 4), weight), Marked)


def test_compiles_without_graph_breaks() -> None:
    def block(x: Tensor, w: Tensor) -> Tensor:
        q, k = (t[None, :, None] for t in NF.linear_group(NF.rms_norm(x, None, 1e-6), [w, w]))
        q = NF.apply_rope(q, torch.ones(3, 2), torch.zeros(3, 2))
        return NF.relu_squared(NF.linear(NF.causal_attention(q, k, k), w))

    x, w = torch.randn(3, 4), torch.randn(4, 4)
    torch.testing.assert_close(torch.compile(block, backend="eager", fullgraph=True)(x, w), block(x, w))


def test_attention_that_would_not_gain_goes_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long rows would store too many probabilities; small float32 heads and inference are slower in blocks."""
    large, small = torch.randn(1, 256, 2, 96), torch.randn(1, 256, 2, 32)
    assert blocked_attention.suits(large, large, large)
    assert not blocked_attention.suits(small, small, small)
    blocked = NF.causal_attention(large, large, large)
    with torch.no_grad():
        torch.testing.assert_close(NF.causal_attention(large, large, large), blocked)
    monkeypatch.setattr(blocked_attention, "MAX_TOKENS", 255)
    assert not blocked_attention.suits(large, large, large)
    torch.testing.assert_close(NF.causal_attention(large, large, large), blocked)


def test_rope_rotates_as_hugging_face_does() -> None:
    x = torch.tensor([1.0, 0.0]).view(1, 1, 2)
    angle = torch.tensor([[0.5]])
    expected = torch.tensor([0.5]).cos(), torch.tensor([0.5]).sin()
    torch.testing.assert_close(NF.apply_rope(x, angle.cos(), angle.sin()).flatten(), torch.cat(expected))


def test_rms_norm_survives_a_row_of_zeros() -> None:
    x = torch.zeros(1, 8, requires_grad=True)
    NF.rms_norm(x, None, 1e-6).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    torch.testing.assert_close(NF.rms_norm(x, None, 1e-6), F.rms_norm(x, (8,), None, 1e-6))
