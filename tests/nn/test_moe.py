"""The mixture-of-experts block against transformers, and its rules in training against counts by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanoworks.nn import batched_experts
from nanoworks.nn.context import DenseContext
from nanoworks.nn.linear import set_compute_dtype
from nanoworks.nn.mlp import SwiGLU
from nanoworks.nn.moe import MoE, Routing, TrainingRules, load_balancing_loss, router_z_loss
from tests.models.families import make

N, C, I, E, K = 24, 16, 20, 6, 2


def block(**changes: Any) -> MoE:
    torch.manual_seed(1)
    moe = MoE(0, **{"hidden_size": C, "intermediate_size": I, "num_experts": E, "num_experts_per_tok": K, **changes})
    torch.nn.init.normal_(moe.gate.weight, std=0.5)
    return moe.train()


def run(moe: MoE, x: Tensor) -> tuple[Tensor, Routing]:
    ctx = DenseContext(torch.zeros(1, len(x), dtype=torch.long))
    y = moe(x, ctx)
    assert ctx.routing is not None
    return y, ctx.routing[0]


def tokens(n: int = N) -> Tensor:
    return torch.randn(n, C, generator=torch.Generator().manual_seed(2))


def expert(moe: MoE, e: int, x: Tensor) -> Tensor:
    gate, up, down = (leaf.weight[e] for leaf in (moe.experts.gate_proj, moe.experts.up_proj, moe.experts.down_proj))
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def by_hand(moe: MoE, x: Tensor, chosen: list[list[tuple[int, float]]]) -> Tensor:
    """Token by token: the sum of `chosen` (expert, weight)."""
    zero = torch.zeros(C)
    return torch.stack([sum((w * expert(moe, e, x[i]) for e, w in pairs), zero) for i, pairs in enumerate(chosen)])


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {}),
        ("mixtral", {"num_experts_per_tok": 1}),
        ("qwen3_moe", {}),
        ("qwen3_moe", {"norm_topk_prob": True, "num_experts_per_tok": 2}),
        ("qwen3_moe", {"mlp_only_layers": [1]}),
    ],
)
def test_router_logits_outputs_and_balance_loss_equal_transformers(
    tmp_path: Any, family: str, changes: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    from nanoworks.checkpoint import save_checkpoint

    model = make(family, **changes)
    with save_checkpoint(tmp_path / "m", model, None, metadata={}):
        pass
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation="eager").eval()
    ids = torch.randint(0, 96, (2, 40))
    ctx = DenseContext(ids)
    logits = model.head(model(ids, ctx))
    theirs = reference(ids, output_router_logits=True, labels=ids)
    torch.testing.assert_close(logits, theirs.logits, atol=1e-5, rtol=0)
    assert ctx.routing is not None
    routings = list(ctx.routing.values())
    assert len(routings) == len(theirs.router_logits)
    for ours, router in zip(routings, theirs.router_logits, strict=True):
        torch.testing.assert_close(ours.logits, router.view_as(ours.logits), atol=1e-5, rtol=0)
    torch.testing.assert_close(load_balancing_loss(routings), theirs.aux_loss, atol=1e-5, rtol=0)

    mask = torch.ones_like(ids)
    mask[0, 30:] = 0
    arguments = (tuple(theirs.router_logits), routings[0].logits.size(1), model.config.num_experts_per_tok)
    expected = load_balancing_loss_func(*arguments, attention_mask=mask)
    torch.testing.assert_close(load_balancing_loss(routings, mask.flatten() > 0), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("softmax_first", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_weights_and_sum_are_those_of_a_loop_over_tokens(k: int, softmax_first: bool, normalize: bool) -> None:
    moe = block(num_experts_per_tok=k, softmax_first=softmax_first, normalize=normalize)
    x = tokens()
    y, routing = run(moe, x)
    chosen = []
    for row in routing.logits.tolist():
        best = sorted(range(E), key=lambda e: -row[e])[:k]
        among = range(E) if softmax_first else best
        total = sum(math.exp(row[e]) for e in among)
        weights = [math.exp(row[e]) / total for e in best]
        if softmax_first and normalize:
            weights = [w / sum(weights) for w in weights]
        chosen.append(list(zip(best, weights, strict=True)))
    torch.testing.assert_close(y, by_hand(moe, x, chosen), atol=1e-5, rtol=1e-5)
    assert int(routing.dropped) == int(routing.overflow) == 0


def test_a_shared_expert_is_added_for_every_token() -> None:
    plain, x = block(), tokens()
    moe = block(shared=SwiGLU(C, I))
    moe.load_state_dict(plain.state_dict(), strict=False)
    assert moe.shared is not None
    torch.testing.assert_close(run(moe, x)[0], run(plain, x)[0] + moe.shared(x))


def brute_force_dropped(experts: Tensor, factor: float) -> set[tuple[int, int]]:
    """(token, rank) of each choice that finds its expert full: first choices are served first, then by token."""
    room = dict.fromkeys(range(E), math.ceil(factor * experts.numel() / E))
    dropped = set()
    for rank in range(experts.size(1)):
        for token in range(experts.size(0)):
            e = int(experts[token, rank])
            if room[e] == 0:
                dropped.add((token, rank))
            else:
                room[e] -= 1
    return dropped


@pytest.mark.parametrize("n", [24, 25, 200])
@pytest.mark.parametrize("factor", [0.3, 1.0, 1.1])
def test_capacity_drops_what_a_count_by_hand_drops_and_keeps_the_residual(n: int, factor: float) -> None:
    moe, x = block(), tokens(n)
    moe.rules = TrainingRules(capacity_factor=factor)
    y, routing = run(moe, x)
    dropped = brute_force_dropped(routing.experts, factor)
    assert 0 < len(dropped) == int(routing.dropped) == int(routing.overflow)
    weights, experts = moe.choose(routing.logits.detach())
    chosen = [[(int(experts[i, r]), float(weights[i, r])) for r in range(K) if (i, r) not in dropped] for i in range(n)]
    torch.testing.assert_close(y, by_hand(moe, x, chosen), atol=1e-5, rtol=1e-5)
    lost = [i for i in range(n) if not chosen[i]]
    if factor == 0.3:
        assert lost  # of such a token the block gives nothing, so the layer's residual is what is left
    assert not y[lost].any()


def test_capacity_of_an_even_routing_drops_nothing() -> None:
    moe = block(num_experts_per_tok=1, hidden_size=E)
    moe.gate.weight.data = torch.eye(E)
    x = torch.eye(E).repeat(5, 1)
    moe.rules = TrainingRules(capacity_factor=1.0)
    assert int(run(moe, x)[1].dropped) == 0
    assert int(run(moe, x[:-1])[1].dropped) == 0  # one expert has one token less


def test_dropless_computes_everything_and_counts_what_is_beyond() -> None:
    moe, x = block(), tokens()
    free = run(moe, x)[0]
    moe.rules = TrainingRules(capacity_factor=0.5, overflow="dropless")
    y, routing = run(moe, x)
    assert torch.equal(y, free)
    assert int(routing.dropped) == 0
    assert int(routing.overflow) == len(brute_force_dropped(routing.experts, 0.5)) > 0


def test_rules_hold_in_training_only() -> None:
    moe, x = block(), tokens()
    free = run(moe, x)[0]
    moe.rules = TrainingRules(capacity_factor=0.1, expert_dropout=0.9, top_k=1, open_experts=2)
    assert torch.equal(run(moe.eval(), x)[0], free)
    assert not torch.equal(run(moe.train(), x)[0], free)


def test_everything_dropped_has_gradients_of_zero() -> None:
    moe, x = block(num_experts_per_tok=1), tokens()
    moe.rules = TrainingRules(capacity_factor=1e-9)  # room for one choice each
    y, routing = run(moe, x)
    used = int((routing.counts > 0).sum())
    assert int(routing.dropped) == N - used
    assert int((y.abs().sum(-1) > 0).sum()) == used
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in moe.parameters())


def test_expert_dropout_closes_experts_and_renormalises() -> None:
    moe, x = block(), tokens()
    moe.rules = TrainingRules(expert_dropout=0.5)
    seen = set()
    for _ in range(60):
        _, routing = run(moe, x)
        assert routing.closed is not None
        closed = routing.closed
        seen.add(tuple(closed.tolist()))
        assert int((~closed).sum()) >= K
        assert not closed[routing.experts].any()
        weights, _ = moe.choose(routing.logits)
        torch.testing.assert_close(weights.sum(-1), torch.ones(N))
    share = sum(sum(s) for s in seen) / (E * len(seen))
    assert len(seen) > 10
    assert 0.3 < share < 0.6


def test_open_experts_and_top_k_by_rule() -> None:
    moe, x = block(), tokens()
    moe.rules = TrainingRules(top_k=3, open_experts=4)
    _, routing = run(moe, x)
    assert routing.experts.shape == (N, 3)
    assert routing.experts.max() < 4
    assert routing.closed is not None
    assert routing.closed.tolist() == [False] * 4 + [True] * 2
    moe.rules = TrainingRules(open_experts=1)
    assert run(moe, x)[1].experts.max() == 1  # two experts a token need two


@pytest.mark.parametrize("softmax_first", [True, False])
def test_selection_bias_counts_in_the_choice_and_not_in_the_weights(softmax_first: bool) -> None:
    moe, x = block(softmax_first=softmax_first, selection_bias=True), tokens()
    assert moe.e_score_correction_bias is not None
    unbiased = run(moe, x)[0]
    torch.testing.assert_close(unbiased, run(block(softmax_first=softmax_first), x)[0])
    moe.e_score_correction_bias[3] = 100.0
    y, routing = run(moe, x)
    assert (routing.experts == 3).any(-1).all()
    scores = routing.logits.detach().softmax(-1)
    chosen = []
    for i in range(N):
        second = max((e for e in range(E) if e != 3), key=lambda e: float(scores[i, e]))
        total = float(scores[i, 3] + scores[i, second])
        chosen.append([(e, float(scores[i, e]) / total) for e in (3, second)])
    torch.testing.assert_close(y, by_hand(moe, x, chosen), atol=1e-5, rtol=1e-5)
    moe.rules = TrainingRules(open_experts=3)
    assert run(moe, x)[1].experts.max() < 3  # a closed expert stays closed, whatever its bias


def test_losses_of_an_even_and_of_a_collapsed_router() -> None:
    none = torch.zeros((), dtype=torch.long)
    even = Routing(torch.zeros(E, E), torch.arange(E)[:, None], none, none)
    assert float(load_balancing_loss([even])) == pytest.approx(1.0)
    collapsed = Routing(F.one_hot(torch.zeros(8, dtype=torch.long), E) * 100.0, torch.zeros(8, 1).long(), none, none)
    assert float(load_balancing_loss([collapsed])) == pytest.approx(E)
    assert float(router_z_loss([even])) == pytest.approx(math.log(E) ** 2)
    closed = torch.tensor([False] * 3 + [True] * 3)
    half = Routing(torch.zeros(3, E).masked_fill(closed, -math.inf), torch.arange(3)[:, None], none, none, closed)
    assert float(load_balancing_loss([half])) == pytest.approx(1.0)


def test_losses_without_a_token_are_zero_and_have_gradients() -> None:
    logits = torch.randn(8, E, requires_grad=True)
    none = torch.zeros((), dtype=torch.long)
    routing = Routing(logits, torch.zeros(8, 1).long(), none, none)
    keep = torch.zeros(8, dtype=torch.bool)
    total = load_balancing_loss([routing], keep) + router_z_loss([routing], keep)
    total.backward()
    assert float(total.detach()) == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_gradients_equal_a_loop_over_experts() -> None:
    moe, x = block(), tokens().requires_grad_()
    run(moe, x)[0].square().sum().backward()
    ours = [p.grad.clone() for p in (x, *moe.parameters()) if p.grad is not None]
    moe.zero_grad()
    x.grad = None
    weights, experts = moe.choose(moe.gate(x))
    y = torch.zeros(N, C)
    for e in range(E):
        rows, ranks = torch.where(experts == e)
        y = y.index_add(0, rows, expert(moe, e, x[rows]) * weights[rows, ranks, None])
    y.square().sum().backward()
    theirs = [p.grad for p in (x, *moe.parameters()) if p.grad is not None]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("rules", [TrainingRules(), TrainingRules(capacity_factor=1.0), TrainingRules(top_k=3)])
@pytest.mark.parametrize(
    ("master", "compute", "call"),
    [
        (torch.float32, None, 0.0),
        (torch.float32, torch.bfloat16, 1e9),  # batched, with padding
        (torch.float32, torch.bfloat16, 0.0),  # one product for each expert
        (torch.bfloat16, None, 1e9),
    ],
)
def test_training_on_a_cpu_equals_the_grouped_products(
    master: torch.dtype,
    compute: torch.dtype | None,
    call: float,
    rules: TrainingRules,
    frozen: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One expert gets nothing; oneDNN takes the groups of more than 8 rows."""
    moe = block(selection_bias=True).to(master)
    set_compute_dtype(moe, compute)
    moe.experts.requires_grad_(not frozen)
    assert moe.e_score_correction_bias is not None
    moe.e_score_correction_bias.data = torch.tensor([-100.0, 0.5, 0, 0, 0, 0])
    moe.rules = rules
    x = tokens(80).to(master).requires_grad_()
    monkeypatch.setattr(batched_experts, "_MIN_ROWS", 8)
    monkeypatch.setattr(batched_experts, "_CALL", call)

    def found() -> list[Tensor]:
        leaves = [x, *(p for p in moe.parameters() if p.requires_grad)]
        for leaf in leaves:
            leaf.grad = None
        y, routing = run(moe, x)
        assert routing.counts[0] == 0
        (y.float() * torch.linspace(-1, 1, C)).sum().backward()
        for leaf in leaves:
            assert leaf.grad is not None
            assert leaf.grad.dtype == master
        return [y, *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    calls: list[int] = []
    mixture = batched_experts.mixture
    monkeypatch.setattr(batched_experts, "mixture", lambda *args: calls.append(1) or mixture(*args))
    ours = found()
    assert calls
    monkeypatch.setattr(batched_experts, "suits", lambda *args: False)
    tolerance = 1e-5 if master == torch.float32 and compute is None else 2e-2
    for a, b in zip(ours, found(), strict=True):
        scale = b.detach().float().abs().max()
        torch.testing.assert_close(a.float() / scale, b.float() / scale, atol=tolerance, rtol=0)


def test_what_is_not_plain_goes_to_the_grouped_products(monkeypatch: pytest.MonkeyPatch) -> None:
    moe, x = block(), tokens()
    leaves = (moe.experts.gate_proj, moe.experts.up_proj, moe.experts.down_proj)
    assert batched_experts.suits(N * K, x, *leaves)
    with torch.no_grad():
        assert not batched_experts.suits(N * K, x, *leaves)  # few rows: the copy of all matrices would cost more
        assert batched_experts.suits(64 * E, x, *leaves)
    with torch.autocast("cpu", torch.bfloat16):
        assert not batched_experts.suits(N * K, x, *leaves)

    class Wrapped(type(leaves[0])):  # type: ignore[misc]
        """As an adapter or a quantized leaf is one."""

    leaves[0].__class__ = Wrapped
    assert not batched_experts.suits(N * K, x, *leaves)
