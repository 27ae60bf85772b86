"""The chunked loss against the plain one in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanoworks.nn.cross_entropy import linear_cross_entropy, token_logprobs

N, C, V = 37, 8, 50


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, targets, weights; a third of the rows has weight 0 and target -1."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, C), torch.randn(V, C)
    targets, weights = torch.randint(0, V, (N,)), torch.rand(N) + 0.5
    weights[::3], targets[::3] = 0, -1
    return hidden, weight, targets, weights


def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    logits = hidden @ weight.t()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.log_softmax(logits, dim=-1).gather(1, targets.clamp(min=0)[:, None])[:, 0]


def gradients(value: Tensor, *of: Tensor) -> list[Tensor]:
    return [g.double() for g in torch.autograd.grad(value, of)]


@pytest.mark.parametrize("softcap", [None, 15.0, 2.0])
@pytest.mark.parametrize("chunk", [None, 1, 10, 64])
def test_loss_and_gradients(
    batch: tuple[Tensor, Tensor, Tensor, Tensor], softcap: float | None, chunk: int | None
) -> None:
    hidden, weight, targets, weights = batch
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(h, w, targets, weights, softcap=softcap, chunk=chunk)
    hd, wd = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = -(weights.double() * logprobs(hd, wd, targets, softcap)).sum()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-5)
    for ours, theirs in zip(gradients(loss / 7, h, w), gradients(exact / 7, hd, wd), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert linear_cross_entropy(h, w, targets, weights, softcap=softcap, chunk=chunk) == loss


@pytest.mark.parametrize("softcap", [None, 15.0])
def test_token_logprobs(batch: tuple[Tensor, Tensor, Tensor, Tensor], softcap: float | None) -> None:
    hidden, weight, targets, weights = batch
    targets = targets.clamp(min=0)
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    ours = token_logprobs(h, w, targets, softcap=softcap, chunk=10)
    hd, wd = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = logprobs(hd, wd, targets, softcap)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-5)
    for a, b in zip(
        gradients((ours * weights).exp().sum(), h, w), gradients((exact * weights).exp().sum(), hd, wd), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_an_all_masked_batch_is_exactly_zero(batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    hidden, weight, targets, _ = batch
    hidden[3] = float("nan")  # what a masked row holds is nobody's business
    hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets, torch.zeros(N))
    loss.backward()
    assert loss == 0
    assert hidden.grad is not None
    assert weight.grad is not None
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_huge_logits_stay_finite() -> None:
    hidden = torch.tensor([[1e4, -1e4]], requires_grad=True)
    weight = torch.eye(2)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1]), torch.ones(1))
    loss.backward()
    assert loss == 2e4
    torch.testing.assert_close(hidden.grad, torch.tensor([[1.0, -1.0]]))


def test_bfloat16_keeps_the_weight_gradient_in_float32(batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    hidden, weight, targets, weights = batch
    weight.requires_grad_()
    linear_cross_entropy(hidden.bfloat16(), weight, targets, weights, softcap=15.0, chunk=10).backward()
    ours = weight.grad
    assert ours is not None
    assert ours.dtype == torch.float32
    assert not torch.equal(ours, ours.bfloat16().float())
    exact = weight.detach().double().requires_grad_()
    (-(weights * logprobs(hidden.double(), exact, targets, 15.0)).sum()).backward()
    assert exact.grad is not None
    assert (ours - exact.grad).norm() < 0.02 * exact.grad.norm()


def test_a_second_backward_is_refused(batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    hidden, weight, targets, weights = batch
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, targets, weights)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
