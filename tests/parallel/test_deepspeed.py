"""DeepSpeed's ZeRO by recipe: whole runs, what they leave and go on from, and what is refused."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nanoworks.checkpoint import load_checkpoint
from nanoworks.checkpoint.checkpoint import write_model
from nanoworks.common.errors import UserError
from nanoworks.config.parallel import ParallelSection
from nanoworks.parallel.deepspeed import DeepSpeed
from nanoworks.train.launch import launch
from tests.parallel import tiny
from tests.parallel.ranks import ranks, replace_all
from tests.parallel.test_launch import LLAMA, MIXTRAL, _nan, run, weights
from tests.parallel.test_launch import tiny as tiny_run
from tests.train.tiny import recipe as tiny_recipe

CPU = torch.device("cpu")
GATHERED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
"""Stage 3 keeps small parameters whole on every rank; here all are small."""


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"strategy": "deepspeed", "zero_stage": stage, "deepspeed": GATHERED if stage == 3 else {}, **more}


def losses(directory: Path) -> list[float]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


PATHS = [
    # (section, ranks): the first is cut after step 2, the second, where a third follows, after step 4
    (MIXTRAL, [({}, 2), (zero(3), 2), ({}, 1)]),
    (LLAMA, [(zero(3), 2), ({"shard": 2}, 2)]),
    (LLAMA, [(zero(1), 2), (zero(3), 2)]),
    (MIXTRAL, [(zero(2), 2), ({"replicate": 2}, 2)]),
    (LLAMA, [({}, 1), (zero(2), 2), (zero(1), 4)]),
    (LLAMA, [(zero(3, offload="all"), 1), ({}, 1)]),
]


@pytest.mark.parametrize(
    ("model", "path"),
    [pytest.param(*case, marks=() if i == 0 else pytest.mark.slow, id=f"path-{i}") for i, case in enumerate(PATHS)],
)
def test_a_run_goes_from_any_strategy_to_any_other(tmp_path: Path, model: Any, path: list[Any]) -> None:
    """As it goes on as many ranks of FSDP2: loss of every step, final weights and optimizer state."""
    for name, way in (("native", [({}, n) for _, n in path]), ("moved", path)):
        for i, (section, n) in enumerate(way):
            recipe = tiny_run(
                tmp_path,
                name,
                model=model,
                parallel=section,
                optim={"name": "adamw"},
                checkpoint={"every": 2, "keep_last": 9},
            )
            outcome = ranks(n).run(_part, recipe, i > 0, 3 + 2 * i if i + 1 < len(way) else 0)[0]
            assert outcome.finished if i + 1 == len(way) else "power cut" in outcome, outcome
    native, moved = tmp_path / "runs/native", tmp_path / "runs/moved"
    assert losses(moved) == pytest.approx(losses(native), abs=1e-5)
    ours, theirs = weights(native), weights(moved)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        if name == "rng.cpu":
            continue  # what DDP draws, DeepSpeed does not
        torch.testing.assert_close(theirs[name], tensor, atol=1e-5, rtol=1e-3, msg=name)
    assert load_checkpoint(moved).config.model_type == model["model_type"]
    if any(section and n == 1 for section, n in path):
        replace_all()  # one process has numbered modules that the others have not, see below


def _part(recipe: Any, resume: bool, at: int) -> Any:
    return run(recipe, resume=resume, event="power cut" if at else "", at=at)


def masters(section: ParallelSection, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The parameters that come out of the engine when nothing was trained."""
    strategy = tiny.opened(section, dtype=dtype)
    decoder, optimizer = tiny.adopted(strategy, tiny.model("llama"), "adamw")
    assert optimizer.state_dict().keys() >= {"layers.0.mlp.down_proj.weight.exp_avg"}
    return {n: t.clone() for n, t in strategy.wholes({n: p.detach() for n, p in decoder.named_parameters()})}


def in_bfloat16(section: ParallelSection) -> tiny.Trained:
    return tiny.train("llama", section=section, dtype=torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_trains_beside_masters_that_are_not_rounded(stage: int) -> None:
    section = ParallelSection(**zero(stage))
    whole = dict(tiny.model("llama").named_parameters())
    for found in ranks(2).run(masters, section, torch.bfloat16):
        assert all(torch.equal(found[name], p.detach()) for name, p in whole.items())
    alone = tiny.train("llama")
    for trained in ranks(2).run(in_bfloat16, section):
        assert trained.losses == pytest.approx(alone.losses, abs=0.02)
        assert trained.losses != pytest.approx(alone.losses, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "what"), [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "all")])
def test_what_is_kept_on_the_host_trains_the_same(stage: int, what: str) -> None:
    compare(ranks(2).run(tiny.train, "llama", "adamw", ParallelSection(**zero(stage, offload=what))), "llama")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("model", ["mixtral", "llama_tied"])
def test_parameters_that_are_really_gathered(stage: int, model: str) -> None:
    compare(ranks(2).run(tiny.train, model, "adamw", ParallelSection(**zero(stage))), model)
    replace_all()  # DeepSpeed numbers modules from a process's start on, and compares the numbers of ranks
    compare(ranks(4).run(tiny.train, model, "adamw", ParallelSection(**zero(stage)), timeout=240), model)


def compare(found: list[tiny.Trained], model: str) -> None:
    alone = tiny.train(model)
    for trained in found:
        assert trained.losses == pytest.approx(alone.losses, abs=1e-5)
        assert trained.norms == pytest.approx(alone.norms, rel=1e-4)
        for ours, theirs in ((trained.parameters, alone.parameters), (trained.state, alone.state)):
            assert ours.keys() == theirs.keys()
            for name, tensor in theirs.items():
                torch.testing.assert_close(ours[name], tensor, atol=1e-5, rtol=1e-3, msg=name)


def overflown(section: ParallelSection) -> tuple[float, bool]:
    strategy = tiny.opened(section)
    decoder, optimizer = tiny.adopted(strategy, tiny.model("llama"), "adamw")
    named = {n: p.detach() for n, p in decoder.named_parameters()}
    before = {n: t.clone() for n, t in strategy.wholes(named)}
    optimizer.zero_grad()
    strategy.forward_backward([tiny.data(0).part(0, 2)], tiny.compute, 1e38)
    norm = strategy.clip(decoder, 1.0)
    return norm, all(torch.equal(before[n], t) for n, t in strategy.wholes(named))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_gradient_that_is_not_finite_is_known_before_the_step(stage: int) -> None:
    assert ranks(2).run(overflown, ParallelSection(**zero(stage))) == [(math.inf, True)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_loss_that_is_not_finite_on_one_rank_stops_all_and_names_it(tmp_path: Path, stage: int) -> None:
    given = tiny_run(tmp_path, "nan", parallel=zero(stage), optim={"name": "adamw"}, model=LLAMA)
    said = ranks(2).run(_nan, given)
    assert all("NonFinite: the loss of step 5 is not finite on rank 1" in s for s in said), said


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_validation_samples_and_rewards_are_those_of_fsdp2(tmp_path: Path, stage: int) -> None:
    for kind, more in (("pretrain", {"eval": {"every": 1}}), ("rl", {})):
        rows = []
        for name, section in (("native", {}), ("zero", zero(stage))):
            train = {"length": "3 steps", "micro_batch_size": 1, "sample_every": 3, "sample_prompts": ["a"]}
            changes: dict[str, Any] = {"run": {"name": f"{kind}-{name}"}, "train": train, "parallel": section, **more}
            given = (
                tiny_run(tmp_path, f"{kind}-{name}", optim={"name": "adamw"}, model=LLAMA, **changes)
                if kind == "pretrain"
                else tiny_recipe(tmp_path, "rl", optim={"name": "adamw"}, **changes)
            )
            outcome = ranks(2).run(run, given)[0]
            assert not isinstance(outcome, str), outcome
            rows.append([json.loads(line) for line in (outcome.run / "metrics.jsonl").read_text().splitlines()])
            assert kind == "rl" or (outcome.run / "samples.jsonl").read_text()
        for ours, theirs in zip(*rows, strict=True):
            assert ours.keys() == theirs.keys()
            for key in ("train/loss", "train/grad_norm", "val/loss", "rl/reward", "rl/length"):
                assert ours.get(key) == pytest.approx(theirs.get(key), abs=1e-4), key


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optim": {"name": "muon_adamw"}}, "MuonAdamW needs whole matrices; set optim.name=adamw"),
        ({"model": MIXTRAL, "moe": {"bias_update_rate": 0.01}}, r"cannot move .*bias.*parallel.zero_stage=2"),
        ({"checkpoint": {"async_save": True}}, "set checkpoint.async_save=false"),
    ],
    ids=["muon", "bias", "async"],
)
def test_what_does_not_go_with_deepspeed_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    given = tiny_run(tmp_path, "no", **{"optim": {"name": "adamw"}, "parallel": zero(3), "model": LLAMA, **changes})
    for answer in ranks(2).run(run, given):
        with pytest.raises(UserError, match=said):
            raise UserError(str(answer))


def compiled() -> str:
    torch.distributed.barrier()  # a rank that is done at once would be gone before the other has come
    with pytest.raises(UserError) as error:
        DeepSpeed(ParallelSection(**zero(2)), CPU, torch.float32, compile=True)
    return str(error.value)


def test_compiled_layers_are_refused() -> None:
    assert all("set hardware.compile=false" in said for said in ranks(2).run(compiled))


def foreign(directory: Path, stage: int) -> dict[str, torch.Tensor]:
    """A model of transformers, trained and saved by a DeepSpeed engine that knows nothing of nanoworks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    DeepSpeed(ParallelSection(**zero(stage)), CPU, torch.float32)
    os.environ["LOCAL_RANK"] = str(torch.distributed.get_rank())
    import deepspeed

    model = LlamaForCausalLM(LlamaConfig(**tiny.SIZES))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 10000},
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    tokens = tiny.data(0).tokens[:2]
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()
    engine.save_checkpoint(str(directory), tag="trained")
    whole = {name: deepspeed.utils.safe_get_full_fp32_param(p).clone() for name, p in model.named_parameters()}
    if torch.distributed.get_rank() == 0:
        model.config.save_pretrained(directory / "hf")
    return whole


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_what_deepspeed_saved_comes_in_through_its_own_converter(tmp_path: Path, stage: int) -> None:
    """It makes safetensors of its pickles, which nanoworks does not read, beside the model's config.json."""
    trained = ranks(2).run(foreign, tmp_path, stage)[0]
    code = (
        "from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as convert; "
        f"convert({str(tmp_path)!r}, {str(tmp_path / 'hf')!r}, safe_serialization=True)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "DS_ACCELERATOR": "cpu"})
    found = load_checkpoint(tmp_path / "hf").model
    (tmp_path / "ours").mkdir()
    write_model(tmp_path / "ours", found, None, metadata={}, read=lambda name: found.get_parameter(name).detach())
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert ours.keys() == trained.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in trained.items())


def test_one_process_without_torchrun_is_told_how_to_start(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs torchrun, for one device too"):
        launch(tiny_run(tmp_path, "no", optim={"name": "adamw"}, parallel=zero(3)))
