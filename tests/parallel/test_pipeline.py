"""Pipeline parallel against one process: losses, gradients and parameters after five steps of AdamW, float32."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from nanoworks.common.errors import UserError
from nanoworks.config.recipe import Checkpointing
from nanoworks.models import Decoder, build_model
from nanoworks.models.registry import config_from_dict
from nanoworks.nn.context import DenseContext
from nanoworks.nn.moe import MoE, TrainingRules, load_balancing_loss, router_z_loss
from nanoworks.parallel.pipeline import Pipeline
from nanoworks.parallel.pipeline_schedule import SCHEDULES
from nanoworks.train.optim import AdamW
from nanoworks.train.stage import Loss
from tests.parallel.ranks import ranks

CPU = torch.device("cpu")
T = 12
STEPS = 5


def slow(value: str) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


@dataclass(frozen=True)
class Rows:
    tokens: Tensor
    targets: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> Rows:
        return self


def model_of(family: str, layers: int, **changes: Any) -> Decoder:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2} if family == "mixtral" else {}
    config = config_from_dict(
        {
            "model_type": family,
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "max_position_embeddings": 32,
            **experts,
            **changes,
        }
    )
    torch.manual_seed(1)
    model = build_model(config)
    model.init_weights()
    for module in model.modules():
        if isinstance(module, MoE):
            module.rules = TrainingRules(capacity_factor=1.1)
    return model


def step_of(step: int, count: int) -> list[Rows]:
    generator = torch.Generator().manual_seed(step)
    batches = []
    for _ in range(count):
        tokens = torch.randint(0, 64, (2, T + 1), generator=generator)
        weights = (torch.rand(2, T, generator=generator) < 0.8).float()
        batches.append(Rows(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), weights))
    return batches


def compute(model: Decoder, batch: Rows) -> Loss:
    """As `train.supervised`: the likelihood, and the losses of routers where there are some."""
    ctx = DenseContext(batch.tokens)
    loss = model.head.loss(model(batch.tokens, ctx), batch.targets, batch.weights)
    if not ctx.routing:
        return Loss(loss)
    routings, count = list(ctx.routing.values()), batch.weights.sum()
    mean = 0.1 * load_balancing_loss(routings) + 0.01 * router_z_loss(routings)
    dropped = torch.stack([r.dropped for r in routings]).sum()
    return Loss(loss + mean * count, {"train/loss": loss, "moe/dropped": dropped})


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@dataclass
class Result:
    losses: list[list[float]]
    metrics: list[dict[str, float]]
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]
    norms: list[float]


def run(model: Decoder, batches_of: Any, step: Any, *, counted: Any, total: Any) -> Result:
    """Five steps. `counted` says of a name whether this rank counts it, `total` sums over ranks."""
    optimizer = AdamW(model.param_groups(), AdamW.Options(lr=0.01))
    result = Result([], [], {}, {}, [])
    model.train()
    for number in range(STEPS):
        optimizer.zero_grad()
        batches, scale = batches_of(number)
        losses = step(batches, compute, scale)
        result.losses.append([float(loss.sum.detach()) for loss in losses])
        result.metrics.append({k: float(sum(x.metrics[k].detach() for x in losses)) for k in losses[0].metrics})
        named = [(n, p) for n, p in model.named_parameters() if counted(n)]
        gradients = {n: whole(p.grad).clone() for n, p in named if p.grad is not None}
        if number == 0:
            result.gradients = gradients
        result.norms.append(total(sum(float(g.square().sum()) for g in gradients.values())) ** 0.5)
        optimizer.step(1.0, number)
    result.parameters = {n: p.detach().clone() for n, p in model.named_parameters()}
    return result


def scaled(number: int, count: int) -> tuple[list[Rows], float]:
    batches = step_of(number, count)
    return batches, 1.0 / float(sum(b.weights.sum() for b in batches))


@functools.cache
def alone(family: str, layers: int, count: int, tied: bool = False) -> Result:
    model = model_of(family, layers, tie_word_embeddings=tied)

    def step(batches: list[Rows], compute: Any, scale: float) -> list[Loss]:
        losses = [compute(model, batch) for batch in batches]
        for loss in losses:
            (loss.sum * scale).backward()
        return losses

    return run(model, lambda n: scaled(n, count), step, counted=lambda n: True, total=float)


def piped(
    schedule: str,
    family: str,
    layers: int,
    count: int,
    tied: bool = False,
    shard: int = 1,
    checkpointing: Checkpointing = "none",
    keep: bool = False,
) -> Result:
    """The same by the ranks; with `shard`, so many pipelines that take micro-batches in turn."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // shard, shard), mesh_dim_names=("pipeline", "shard"))
    model = model_of(family, layers, tie_word_embeddings=tied)
    model.activation_checkpointing = checkpointing
    pipeline = Pipeline(model, mesh.get_group("pipeline"), schedule=schedule, device=CPU, sequence_length=T)
    if shard > 1:
        pipeline.shard(mesh["shard"], layers={"reshard_after_forward": not keep})

    def batches_of(number: int) -> tuple[list[Rows], float]:
        batches, scale = scaled(number, count)
        return batches[mesh.get_local_rank("shard") :: shard], scale * shard  # FSDP averages

    def total(square: float) -> float:
        figure = torch.tensor(square)
        dist.all_reduce(figure, group=pipeline.group)
        return float(figure)

    result = run(
        model, batches_of, pipeline.forward_backward, counted=lambda n: n not in pipeline.duplicates, total=total
    )
    result.parameters = {name: t.clone() for name, t in pipeline.wholes(result.parameters, whole)}
    assert 0 <= pipeline.measured["pipeline/bubble"] < 1
    assert 0 < pipeline.measured["pipeline/bubble_expected"] < 0.5
    return result


def same(results: list[Result], expected: Result, shard: int = 1) -> None:
    gradients: dict[str, Tensor] = {}
    for rank, result in enumerate(results):
        supervised = 40  # tokens at least of a micro-batch: the loss a token is equal to 1e-5
        mine = [losses[rank % shard :: shard] for losses in expected.losses]
        torch.testing.assert_close(result.losses, mine, rtol=0, atol=1e-5 * supervised / 4)
        torch.testing.assert_close(result.norms, expected.norms, rtol=1e-5, atol=1e-6)
        if shard == 1:
            torch.testing.assert_close(result.metrics, expected.metrics, rtol=1e-5, atol=0)
        assert result.parameters.keys() == expected.parameters.keys()
        torch.testing.assert_close(result.parameters, expected.parameters, rtol=1e-4, atol=1e-5)
        gradients.update(result.gradients)
    torch.testing.assert_close(gradients, expected.gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("schedule", [*(slow(name) for name in SCHEDULES if name != "zbv"), "zbv"])
@pytest.mark.parametrize("family", [slow("llama"), "mixtral"])
def test_two_ranks(schedule: str, family: str) -> None:
    same(ranks(2).run(piped, schedule, family, 5, 4), alone(family, 5, 4))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv"])
def test_four_ranks(schedule: str) -> None:
    same(ranks(4).run(piped, schedule, "mixtral", 8, 8), alone("mixtral", 8, 8))


@pytest.mark.parametrize("schedule", ["gpipe", slow("interleaved_1f1b"), slow("interleaved_zero_bubble"), "zbv"])
def test_tied_embedding(schedule: str) -> None:
    same(ranks(2).run(piped, schedule, "llama", 5, 4, True), alone("llama", 5, 4, True))


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "keep"), [*((name, False) for name in SCHEDULES), ("1f1b", True)])
def test_sharded_stages(schedule: str, keep: bool) -> None:
    same(ranks(4).run(piped, schedule, "llama", 5, 8, False, 2, "none", keep), alone("llama", 5, 8), shard=2)


def test_sharded_tied_embedding() -> None:
    same(ranks(4).run(piped, "1f1b", "llama", 5, 8, True, 2), alone("llama", 5, 8, True), shard=2)


@pytest.mark.parametrize("schedule", [slow("gpipe"), slow("1f1b"), "interleaved_1f1b", "zbv"])
def test_activation_checkpointing(schedule: str) -> None:
    what: Checkpointing = "full" if SCHEDULES[schedule].splits_backward else "selective"
    same(ranks(2).run(piped, schedule, "llama", 5, 4, False, 1, what), alone("llama", 5, 4))


def test_a_family_with_its_own_embedding() -> None:
    same(ranks(2).run(piped, "1f1b", "nanochat", 5, 4), alone("nanochat", 5, 4))


def shapes_and_refusals() -> list[str]:
    """What a pipeline says to what it cannot do, on every rank alike."""
    group = dist.group.WORLD
    assert group is not None

    def make(family: str = "llama", layers: int = 4, **options: Any) -> Pipeline:
        return Pipeline(model_of(family, layers), group, device=CPU, sequence_length=T, **options)

    def said(function: Any) -> str:
        with pytest.raises(UserError) as error:
            function()
        return str(error.value)

    pipeline = make(schedule="1f1b")
    rows = step_of(0, 4)
    short = Rows(rows[0].tokens[:, :5], rows[0].targets[:, :5], rows[0].weights[:, :5])
    return [
        said(lambda: make(layers=1)),
        said(lambda: make(layers=3, schedule="zbv")),
        said(lambda: make(schedule="later")),
        said(lambda: make(schedule="1f1b", per_rank=2)),
        said(lambda: make("nanochat_2026")),
        said(lambda: pipeline.forward_backward(rows[:1], compute, 1.0)),
        said(lambda: pipeline.forward_backward([*rows, short], compute, 1.0)),
        said(lambda: pipeline.forward_backward([], compute, 1.0)),
    ]


def test_refusals() -> None:
    both = ranks(2).run(shapes_and_refusals)
    assert both[0] == both[1]
    parts = [
        "the model has 1; take at most 1",
        "4 pipeline stages need as many layers, and the model has 3",
        "unknown; take one of gpipe, 1f1b",
        "1f1b has 1 stages a rank, not 2",
        "nanochat_2026 need more than the hidden states",
        "at least one for each of the 2 stages. Counts that do: 2, 3, 4",
        "one length",
        "there is none",
    ]
    for message, part in zip(both[0], parts, strict=True):
        assert part in message


def counts_and_whole_figures() -> list[Any]:
    """A step of another size after the first, and what a cut model says of itself."""
    model = model_of("llama", 4)
    figures = [model.num_parameters(), model.flops_per_token(T)]
    group = dist.group.WORLD
    assert group is not None
    pipeline = Pipeline(model, group, schedule="1f1b", device=CPU, sequence_length=T)
    found = []
    for count in (2, 5, 2):
        losses = pipeline.forward_backward(step_of(0, count), compute, 1.0)
        found.append([float(loss.sum) for loss in losses])
    assert found[0] == found[2] == found[1][:2]
    assert [model.num_parameters(), model.flops_per_token(T)] == figures
    with pytest.raises(RuntimeError, match="another pipeline rank"):
        compute(model, step_of(0, 1)[0])
    return found


def test_a_step_may_change_its_size() -> None:
    first, second = ranks(2).run(counts_and_whole_figures)
    assert first == second
    assert len(first[1]) == 5
