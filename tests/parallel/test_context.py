"""Context parallel beside what `test_matrix` compares: every family, masks, documents, drops, evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nanoworks.common.errors import UserError
from nanoworks.config.parallel import ParallelSection
from nanoworks.config.recipe import Checkpointing
from nanoworks.models import Decoder
from nanoworks.nn.context import Attending, DenseContext, Window
from nanoworks.nn.moe import MoE, TrainingRules
from nanoworks.parallel import SingleDevice, Strategy
from nanoworks.parallel.context import Shares, _ExchangingContext, _GatheringContext, check_rows
from nanoworks.parallel.mesh import Degrees
from nanoworks.parallel.native import Native
from nanoworks.parallel.shards import full
from nanoworks.parallel.support import refusal
from tests.models.families import make
from tests.parallel import tiny
from tests.parallel.ranks import ranks

METHODS = ("all_gather", "ulysses")
B, T, D = 2, 32, 8
CPU = torch.device("cpu")


def documents() -> Tensor:
    """Borders inside parts, between parts, and other ones in each row."""
    borders = torch.zeros(B, T, dtype=torch.long)
    borders[0, [5, 8, 27]] = 1
    borders[1, [16, 17]] = 1
    return borders.cumsum(1)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.7},
    "window": {"window": Window(6)},
    "sinks of a window": {"window": Window(5, first=2)},
    "global tokens": {"window": Window(5, token_ids=(3, 4))},
    "softcap": {"softcap": 2.0},
    "learned sinks": {"sinks": True},
    "all": {"window": Window(9, first=1), "softcap": 3.0, "sinks": True, "scale": 0.4},
}


def attended(method: str, heads: tuple[int, int]) -> dict[str, list[Tensor]]:
    """Output and gradients of whole rows and of this rank's tokens, for each of `OPTIONS`, with documents and without;
    what should be equal stands side by side."""
    group, shares = dist.group.WORLD, Shares(dist.group.WORLD, halves=method == "all_gather")
    kind = _GatheringContext if method == "all_gather" else _ExchangingContext
    found = {}
    for name, options in OPTIONS.items():
        for docs in (None, documents()):
            torch.manual_seed(1)
            q, k, v = (torch.randn(B, T, h, D) for h in (heads[0], heads[1], heads[1]))
            tokens, wanted = torch.randint(8, (B, T)), torch.randn(B, T, heads[0], D)
            sinks = torch.randn(heads[0]) if options.get("sinks") else None
            whole = DenseContext(tokens, documents=docs)
            mine = kind(DenseContext(tokens, documents=docs), shares)
            both = []
            for ctx, take in ((whole, lambda x: x), (mine, shares.take)):
                inputs = [take(x).clone().requires_grad_() for x in (q, k, v)]
                inputs += [] if sinks is None else [sinks.clone().requires_grad_()]
                values = {**options, "sinks": inputs[3] if sinks is not None else None}
                y = ctx.attend(0, *inputs[:3], Attending(**values))
                (y * take(wanted)).sum().backward()
                both.append([y.detach(), *(x.grad for x in inputs)])
            if sinks is not None:
                dist.all_reduce(both[1][4], group=group)
            expected = [shares.take(x) if x.ndim == 4 else x for x in both[0]]
            pairs = zip(both[1], expected, strict=True)
            found[f"{name}, documents {docs is not None}"] = [torch.stack([a, b]) for a, b in pairs]
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("n", "heads"), [(2, (4, 2)), pytest.param(4, (4, 4), marks=pytest.mark.slow)])
def test_attention_of_shares_is_that_of_the_whole(method: str, n: int, heads: tuple[int, int]) -> None:
    for found in ranks(n).run(attended, method, heads):
        for name, tensors in found.items():
            for ours, whole in tensors:
                torch.testing.assert_close(ours, whole, atol=2e-6, rtol=1e-4, msg=name)


def figures(
    family: str,
    changes: dict[str, Any],
    section: ParallelSection | None,
    how: str = "",
    rules: TrainingRules | None = None,
    checkpointing: Checkpointing = "none",
) -> dict[str, Tensor]:
    """Loss, gradients, and what the routers did, of two micro-batches; alone without a `section`."""
    strategy: Strategy = (
        SingleDevice(CPU, activation_checkpointing=checkpointing)
        if section is None
        else Native(section, CPU, torch.float32, activation_checkpointing=checkpointing)
    )
    model = strategy.prepare(make(family, **changes))
    model.train()
    for module in model.modules():
        if isinstance(module, MoE) and rules is not None:
            module.rules = rules
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(96, (2 * B, T + 1), generator=generator)
    supervised = (torch.rand(2 * B, T, generator=generator) > 0.3).float()
    if how == "an answer at the beginning":
        supervised[:, T // 4 :] = 0  # nothing for the second rank
    batch = tiny.Rows(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), supervised)
    found: dict[str, Tensor] = {}

    def compute(decoder: Decoder, rows: tiny.Rows) -> tiny.Loss:
        ctx = DenseContext(rows.tokens, documents=documents() if how == "documents" else None)
        hidden = decoder(rows.tokens, ctx)
        if how == "logprobs":
            logprobs = decoder.head.logprobs(hidden, rows.targets)
            found["logprobs"] = logprobs.detach()
            loss = (logprobs.exp() * rows.weights).sum()
        else:
            loss = decoder.head.loss(hidden, rows.targets, rows.weights)
        for layer, r in (ctx.routing or {}).items():
            loss = loss + 0.1 * (r.logits.softmax(-1).mean(0).square().sum() + r.logits.logsumexp(-1).square().mean())
            for name in ("logits", "experts", "overflow", "dropped"):
                found[f"{layer} {name}"] = getattr(r, name).detach()
        return tiny.Loss(loss)

    losses = strategy.forward_backward([batch.part(i, 2) for i in range(2)], compute, 0.1)
    found["loss"] = torch.stack([loss.sum.detach() for loss in losses])
    for name, p in model.named_parameters():
        if p.grad is not None:
            found[f"grad of {name}"] = full(p.grad)
    return found


CASES: list[Any] = [
    ("mistral", {}, "documents"),
    ("nanochat_2026", {}, "documents"),
    ("mixtral", {}, "an answer at the beginning"),
    ("llama", {"tie_word_embeddings": True, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "logprobs"),
]
CASES += [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in (
        *((family, {}, how) for family in ("qwen2", "qwen3", "smollm3", "nanochat") for how in ("", "documents")),
        ("nanochat", {}, "logprobs"),
        ("mistral", {}, "an answer at the beginning"),
        ("qwen3_moe", {}, "documents"),
        ("llama", {}, "an answer at the beginning"),
        ("llama", {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.1] * 8, "long_factor": [2.0] * 8,
                                    "factor": 2.0, "original_max_position_embeddings": 16}}, ""),
    )
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("family", "changes", "how"), CASES)
def test_a_family_trains_on_shares_as_on_whole_rows(
    family: str, changes: dict[str, Any], how: str, method: str
) -> None:
    section = ParallelSection(context=2, context_method=method)  # type: ignore[arg-type]
    compare(ranks(2).run(figures, family, changes, section, how), figures(family, changes, None, how))


@pytest.mark.parametrize(
    ("method", "rules"),
    [
        ("all_gather", TrainingRules(capacity_factor=0.8)),
        pytest.param("ulysses", TrainingRules(capacity_factor=0.8), marks=pytest.mark.slow),
        pytest.param("ulysses", TrainingRules(capacity_factor=0.8, overflow="dropless"), marks=pytest.mark.slow),
        pytest.param("all_gather", TrainingRules(top_k=1, open_experts=3), marks=pytest.mark.slow),
    ],
)
def test_capacities_are_those_of_whole_rows(method: str, rules: TrainingRules) -> None:
    section = ParallelSection(context=2, context_method=method)  # type: ignore[arg-type]
    expected = figures("mixtral", {}, None, "", rules)
    assert (expected["0 overflow"] > 0) == (rules.capacity_factor is not None)
    compare(ranks(2).run(figures, "mixtral", {}, section, "", rules), expected)


@pytest.mark.parametrize("checkpointing", ["full", pytest.param("selective", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
def test_activations_that_are_computed_again(method: str, checkpointing: Checkpointing) -> None:
    section = ParallelSection(context=2, context_method=method)  # type: ignore[arg-type]
    rules = TrainingRules(capacity_factor=1.0)
    found = ranks(2).run(figures, "mixtral", {}, section, "", rules, checkpointing)
    compare(found, figures("mixtral", {}, None, "", rules))


def compare(found: list[dict[str, Tensor]], expected: dict[str, Tensor]) -> None:
    for figure in found:
        assert figure.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(figure[name], value, atol=1e-5, rtol=1e-4, msg=name)


def measured() -> list[Tensor]:
    """Hidden states in evaluation: of the model itself, and of what the engine is given; rows of an odd length."""
    strategy = Native(ParallelSection(context=2), CPU, torch.float32)
    model = strategy.prepare(make("mistral"))
    tokens = torch.arange(2 * 31).view(2, 31) % 96
    found = []
    with torch.no_grad():
        for decoder in (model.eval(), strategy.replica(model)):
            hidden = decoder(tokens, DenseContext(tokens))
            found += [hidden, decoder.head.logprobs(hidden[tokens > 9], tokens[tokens > 9])]
            strategy.settle()
    replica = strategy.replica(model.train())
    assert replica.training
    assert replica(tokens, DenseContext(tokens)).shape == (2, 31, 64)  # also where it is to train
    return found


def test_evaluation_and_sampling_see_whole_rows() -> None:
    model, tokens = make("mistral").eval(), torch.arange(2 * 31).view(2, 31) % 96
    with torch.no_grad():
        hidden = model(tokens, DenseContext(tokens))
        expected = [hidden, model.head.logprobs(hidden[tokens > 9], tokens[tokens > 9])] * 2
    for found in ranks(2).run(measured):
        for ours, whole in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, whole, atol=1e-5, rtol=1e-4)


def test_rows_that_cannot_be_shared() -> None:
    check_rows(62, 2, "ulysses")
    with pytest.raises(UserError, match="sequence_length=4, or another multiple of 4"):
        check_rows(3, 2, "all_gather")


def heads(kv: int, tensor: int) -> str:
    section = ParallelSection(context=2, context_method="ulysses", tensor=tensor, shard=1)
    strategy = Native(section, CPU, torch.float32)
    try:
        strategy.prepare(make("llama", num_key_value_heads=kv))
    except UserError as error:
        return str(error)
    return ""


def test_heads_that_cannot_be_shared() -> None:
    assert "cannot share the 1 key/value heads; set parallel.context_method=all_gather" in ranks(2).run(heads, 1, 1)[0]
    assert "of each of 2 tensor ranks" in ranks(4).run(heads, 2, 2)[0]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"pipeline": 2, "context": 2}, "pipeline with context"),
        ({"expert": 2, "shard": 2, "context": 2}, "expert with"),
    ],
)
def test_what_does_not_go_with_it(values: dict[str, int], said: str) -> None:
    assert said in str(refusal(ParallelSection(**values), Degrees(**values)))  # type: ignore[arg-type]
