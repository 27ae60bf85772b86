"""Expert parallel beside what `test_matrix` compares: tokens that all go to one expert, drops, a shared block, runs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import init_device_mesh

from nanoworks.common.errors import UserError
from nanoworks.config import Recipe
from nanoworks.config.parallel import ParallelSection
from nanoworks.models import Decoder
from nanoworks.nn.context import DenseContext
from nanoworks.nn.linear import set_compute_dtype
from nanoworks.nn.mlp import SwiGLU
from nanoworks.nn.moe import AS_BUILT, MoE, TrainingRules
from nanoworks.parallel.expert import split_experts
from nanoworks.parallel.mesh import Degrees, degrees
from nanoworks.parallel.shards import full, local
from nanoworks.parallel.support import refusal
from tests.parallel import tiny
from tests.parallel.ranks import ranks
from tests.parallel.test_launch import MIXTRAL, run, weights
from tests.parallel.test_launch import tiny as recipe_of
from tests.parallel.test_matrix import alone, compare

C = tiny.SIZES["hidden_size"]


def block(model: Decoder) -> MoE:
    found: Any = model.layers[0]
    return found.mlp  # type: ignore[no-any-return]


def passed(moe: MoE, x: Tensor) -> dict[str, Tensor]:
    """What comes of `x` (N, C), of the router, and the gradients of a sum of squares; those of weights whole."""
    x = x.clone().requires_grad_()
    ctx = DenseContext(torch.zeros(1, len(x), dtype=torch.long))
    y = moe(x, ctx)
    y.square().sum().backward()
    assert ctx.routing is not None
    routing = ctx.routing[0]
    found = {"y": y.detach(), "x": x.grad, "dropped": routing.dropped, "counts": routing.counts}
    for name, p in moe.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, name
            found[name] = full(p.grad)
    return found


def both_ways(rules: TrainingRules, one_expert: bool, shared: bool, dtype: torch.dtype | None) -> dict[str, Any]:
    """A block over all ranks and the whole block, each rank with tokens of its own, of a number of its own."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = tiny.model("mixtral")
    moe = block(model)
    if shared:
        moe.shared = SwiGLU(C, C)
    x = torch.randn(10 + 3 * rank, C, generator=torch.Generator().manual_seed(rank))
    if one_expert:
        moe.add_selection_bias()
        moe.e_score_correction_bias.data[2] = 10.0  # type: ignore[union-attr]
        moe.top_k = 1
    whole = copy.deepcopy(moe)
    split_experts(model, init_device_mesh("cpu", (world,)))
    for m in (moe, whole):
        m.train().rules = rules
        set_compute_dtype(m, dtype)
    found, expected = passed(moe, x), passed(whole, x)
    for name in expected:
        if name.startswith("experts"):  # of all tokens, and divided by the number of ranks: the mean
            dist.all_reduce(expected[name])
            expected[name] /= world
    return {"found": found, "expected": expected}


CASES: dict[str, tuple[TrainingRules, bool, bool, torch.dtype | None]] = {
    "as built": (AS_BUILT, False, False, None),
    "one expert gets all": (AS_BUILT, True, False, None),
    "some choices are dropped": (TrainingRules(capacity_factor=0.7), False, False, None),
    "all to one, which drops": (TrainingRules(capacity_factor=0.5), True, False, None),
    "a shared block": (AS_BUILT, False, True, None),
    "bfloat16": (AS_BUILT, False, True, torch.bfloat16),
}


@pytest.mark.parametrize("case", CASES)
def test_a_block_gives_what_the_whole_block_gives(case: str) -> None:
    rules, one_expert, _, dtype = CASES[case]
    tolerance = {"atol": 1e-6, "rtol": 1e-5} if dtype is None else {"atol": 0.02, "rtol": 0.05}
    results = ranks(2).run(both_ways, *CASES[case])
    for result in results:
        found, expected = result["found"], result["expected"]
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, **tolerance, msg=f"{name}")
        assert int(found["dropped"]) > 0 or rules.capacity_factor is None
        if one_expert:
            assert found["counts"][2] == found["counts"].sum()


def waiting() -> list[str]:
    """What happens in a block, in order."""
    model = tiny.model("mixtral")
    moe = block(model)
    moe.shared = SwiGLU(C, C)
    split_experts(model, init_device_mesh("cpu", (2,)))
    events: list[str] = []

    send = moe.experts.send

    def watched(*args: Any) -> Any:
        sent = send(*args)
        moe.shared.register_forward_hook(  # type: ignore[union-attr]
            lambda *_: events.append(f"shared, {'on their way' if not arrived(sent.rows) else 'arrived'}")
        )
        return sent

    moe.experts.send = watched  # type: ignore[method-assign]
    moe.experts.register_forward_pre_hook(lambda *_: events.append("experts"))
    passed(moe, torch.randn(9, C))
    return events


def arrived(rows: Tensor) -> bool:
    return not isinstance(rows, AsyncCollectiveTensor) or rows.completed


def test_a_shared_block_is_computed_while_tokens_travel() -> None:
    assert ranks(2).run(waiting) == [["shared, on their way", "experts"]] * 2


def few(section: ParallelSection) -> tiny.Trained:
    return tiny.train("mixtral_2", "muon_adamw", section)


@pytest.mark.parametrize(
    "values", [{}, *(pytest.param(values, marks=pytest.mark.slow) for values in ({"tensor": 2}, {"expert": 2}))]
)
def test_more_ranks_than_experts_have_a_part_of_each(values: dict[str, int]) -> None:
    """Two experts on four ranks; each rank has a part, and training is that of one process."""
    compare(ranks(4).run(few, ParallelSection(**values)), alone("mixtral_2", "muon_adamw"), "muon_adamw")
    held = ranks(4).run(parts, ParallelSection(**values))
    assert held[0] > 0
    assert len(set(held)) == 1


def parts(section: ParallelSection) -> int:
    """Elements of the experts that this rank holds."""
    from nanoworks.parallel.native import Native

    model = Native(section, torch.device("cpu"), torch.float32).prepare(tiny.model("mixtral_2"))
    return sum(local(p).numel() for name, p in model.named_parameters() if ".experts." in name)


def again(section: ParallelSection) -> tiny.Trained:
    return tiny.train("mixtral", section=section, checkpointing="full")


def test_activations_that_are_computed_again_change_nothing() -> None:
    compare(ranks(2).run(again, ParallelSection(expert=2)), alone("mixtral", "adamw"), "adamw")


def split(name: str) -> str:
    try:
        split_experts(tiny.model(name), init_device_mesh("cpu", (dist.get_world_size(),)))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("model", "n", "said"),
    [
        ("mixtral_2", 4, "expert=4 does not divide the 2 experts of a layer; use one of 1, 2"),
        ("llama", 2, "a llama, which has no experts; use parallel.shard"),
    ],
)
def test_a_model_that_does_not_divide_is_refused(model: str, n: int, said: str) -> None:
    assert all(said in answer for answer in ranks(n).run(split, model))


@pytest.mark.parametrize(
    ("values", "world", "same"),
    [({}, 8, (1, 4)), ({"replicate": 2, "shard": 4}, 8, (2, 2)), ({"replicate": 8, "shard": 1}, 8, (4, 1))],
)
def test_expert_ranks_are_taken_out_of_the_data_ranks(
    values: dict[str, int], world: int, same: tuple[int, int]
) -> None:
    found = degrees(ParallelSection(expert=2, **values), world)
    assert found.data == world
    assert found.same_experts == same


@pytest.mark.parametrize(
    ("values", "world", "said"),
    [
        ({"expert": 3}, 8, "does not fit replicate=1 shard=8, .* use one of 1, 2, 4, 8"),
        ({"expert": 4, "replicate": 2}, 12, "does not fit replicate=2 shard=6, .* use one of 1, 2, 3, 6, 12"),
    ],
)
def test_degrees_that_do_not_fit_are_refused_with_those_that_do(values: dict[str, int], world: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        degrees(ParallelSection(**values), world)
    assert "not built" in str(refusal(ParallelSection(), Degrees(shard=2, expert=2, tensor=2)))


def of(root: Path, name: str, **parallel: Any) -> Recipe:
    moe = {"bias_update_rate": 0.01, "balance_coef": 0.01, "z_loss_coef": 0.001, "capacity_factor": 1.0}
    # Muon works in bfloat16: the last bit of a gradient becomes one of bfloat16.
    return recipe_of(root, name, model=MIXTRAL, moe=moe, optim={"name": "adamw"}, parallel=parallel)


def test_a_run_goes_on_without_expert_ranks_and_its_figures_are_those_without(tmp_path: Path) -> None:
    whole, moved = of(tmp_path, "whole"), of(tmp_path, "moved", expert=2)
    assert ranks(2).run(run, whole)[0].finished
    assert "power cut" in ranks(2).run(until_a_power_cut, moved)[0]
    assert ranks(2).run(on, of(tmp_path, "moved"))[0].finished
    expected, found = (tmp_path / "runs" / "whole", tmp_path / "runs" / "moved")
    rows = [[json.loads(line) for line in (d / "metrics.jsonl").read_text().splitlines()] for d in (expected, found)]
    for ours, theirs in zip(*rows, strict=True):
        for name in ours:
            if name.startswith(("moe/", "val/", "train/loss", "train/grad_norm")):
                assert theirs[name] == pytest.approx(ours[name], rel=1e-4, abs=1e-5), (ours["step"], name)
    assert rows[0][0]["moe/drop_rate"] > 0
    ours, theirs = weights(expected), weights(found)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], atol=1e-5, rtol=1e-4, msg=name)


def until_a_power_cut(recipe: Recipe) -> Any:
    return run(recipe, event="power cut", at=5)


def on(recipe: Recipe) -> Any:
    return run(recipe, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("then", [{}, {"expert": 4}, {"expert": 2, "replicate": 4, "shard": 1}])
def test_what_expert_ranks_saved_in_parts_goes_on_anywhere(tmp_path: Path, then: dict[str, int]) -> None:
    """From EP x FSDP2 on four ranks, which cut the experts twice."""
    whole, moved = of(tmp_path, "whole"), of(tmp_path, "moved", expert=2)
    assert ranks(4).run(run, whole)[0].finished
    assert "power cut" in ranks(4).run(until_a_power_cut, moved)[0]
    assert ranks(4).run(on, of(tmp_path, "moved", **then))[0].finished
    ours, theirs = (weights(tmp_path / "runs" / name) for name in ("whole", "moved"))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], atol=1e-5, rtol=1e-4, msg=name)
