"""Whole runs on several ranks: what is written, resuming, signals, a loss that is not finite, and bad input."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nanoworks.checkpoint import load_checkpoint, load_state, steps_of
from nanoworks.common.errors import UserError
from nanoworks.config import Recipe
from nanoworks.config.parallel import ParallelSection
from nanoworks.parallel.mesh import degrees
from nanoworks.train.launch import launch
from nanoworks.train.stage import Loss
from nanoworks.train.supervised import Pretrain
from nanoworks.train.trainer import NonFinite, Trainer
from tests.parallel.ranks import ranks
from tests.train.tiny import recipe

MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_hidden_layers": 2,
}

LLAMA = {"model_type": "llama", **{k: v for k, v in MIXTRAL.items() if k not in ("model_type", "num_local_experts")}}


def tiny(root: Path, name: str, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "run": {"name": name},
        "train": {"length": "6 steps", "micro_batch_size": 1},
        "eval": {"every": 3},
        "data": {"validation": [{"name": "jsonl", "path": str(root / "corpus.jsonl")}]},
    }
    return recipe(root, **{**values, **changes})


def run(recipe: Recipe, *, resume: bool = False, event: str = "", at: int = 0) -> Any:
    """`launch` on this rank; `event` happens to rank 1 in step number `at`."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    step, loss = Trainer._step, Pretrain.loss

    def eventful(self: Trainer, batches: Any) -> None:
        now = self.progress.step + 1 == at
        if now and event == "power cut":
            raise RuntimeError("power cut")
        if now and rank == 1 and event == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        if now and rank == 1 and event == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if now and rank == 1 and event == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if now and rank == 1 and event == "hang":
            Pretrain.loss = lambda self, model, batch: time.sleep(600)  # type: ignore[method-assign,assign,return-value]
        if now and rank == 1 and event == "hang while reading":
            batches = iter(lambda: time.sleep(600), None)
        if rank == 1 and event == "slow":
            batches = _late(batches)
        if now and rank == 1 and event == "nan":
            Pretrain.loss = lambda self, model, batch: Loss(loss(self, model, batch).sum * float("nan"))  # type: ignore[method-assign]
        step(self, batches)

    Trainer._step = eventful  # type: ignore[method-assign]
    try:
        return launch(recipe, resume=resume)
    except (NonFinite, UserError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        Trainer._step, Pretrain.loss = step, loss  # type: ignore[method-assign]
        os.environ.pop("WORLD_SIZE")


def _late(batches: Any) -> Any:
    time.sleep(0.05)
    yield next(batches)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    step = steps_of(directory)[-1]
    state, _ = load_state(step / "state")
    with state:
        return load_file(step / "model.safetensors") | dict(state)


@pytest.mark.parametrize("model", [None, MIXTRAL], ids=["nanochat", "mixtral"])
def test_a_run_on_two_ranks_resumes_to_the_bit_and_elsewhere(tmp_path: Path, model: dict[str, Any] | None) -> None:
    changes = {} if model is None else {"model": model, "moe": {"bias_update_rate": 0.01}}
    whole, cut = tiny(tmp_path, "whole", **changes), tiny(tmp_path, "cut", **changes)
    outcomes = ranks(2).run(run, whole)
    assert [(o.finished, o.is_main) for o in outcomes] == [(True, True), (True, False)]
    directory = outcomes[0].run
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "train/loss" in r] == list(range(1, 7))
    assert len([r for r in rows if "val/loss" in r]) == 2
    assert sorted(p.name for p in (directory / "logs").iterdir()) == ["rank-000.log", "rank-001.log"]
    assert load_checkpoint(directory).config.model_type == whole.model["model_type"]  # type: ignore[index]

    assert "power cut" in ranks(2).run(_cut, cut)[0]
    assert "RuntimeError: power cut" in (directory.with_name("cut") / "logs" / "rank-001.log").read_text()
    assert ranks(2).run(_resume, cut)[0].finished
    ours, theirs = weights(directory), weights(directory.with_name("cut"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)

    moved = tiny(tmp_path, "moved", **changes)
    assert "power cut" in ranks(2).run(_cut, moved)[0]
    assert launch(moved, resume=True).finished  # and by one process
    assert steps_of(directory.with_name("moved"))[-1].name == "step-000006"


def _cut(recipe: Recipe) -> Any:
    return run(recipe, event="power cut", at=5)


def _resume(recipe: Recipe) -> Any:
    return run(recipe, resume=True)


def _signal(recipe: Recipe) -> Any:
    return run(recipe, event="signal", at=2)


def _nan(recipe: Recipe) -> Any:
    return run(recipe, event="nan", at=5)


FSDP2: dict[str, Any] = {}
PIPELINE = {"parallel": {"pipeline": 2}, "model": LLAMA}


@pytest.mark.parametrize("how", [FSDP2, PIPELINE], ids=["FSDP2", "pipeline"])
def test_a_signal_to_one_rank_stops_all_and_saves_once(tmp_path: Path, how: dict[str, Any]) -> None:
    outcomes = ranks(2).run(_signal, tiny(tmp_path, "signal", **how))
    assert [o.finished for o in outcomes] == [False, False]
    assert [p.name for p in steps_of(outcomes[0].run)] == ["step-000002"]


@pytest.mark.parametrize("how", [FSDP2, PIPELINE], ids=["FSDP2", "pipeline"])
def test_a_loss_that_is_not_finite_on_one_rank_stops_all_and_names_it(tmp_path: Path, how: dict[str, Any]) -> None:
    said = ranks(2).run(_nan, tiny(tmp_path, "nan", **how))
    who = "rank 1" if how is FSDP2 else "ranks 0 and 1"  # both stages worked on these rows
    assert all(f"NonFinite: the loss of step 5 is not finite on {who}" in s and "step-000003" in s for s in said)
    assert [p.name for p in steps_of(tmp_path / "runs" / "nan")] == ["step-000003"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parallel": {"tensor": 3}}, r"tensor=3 does not make 2 ranks.*\n  tensor=2"),
        (
            {"parallel": {"tensor": 2}, "model": {**MIXTRAL, "num_key_value_heads": 1}},
            "must divide num_attention_heads",
        ),
        ({"train": {"length": "6 steps", "tokens_per_step": 192}}, "2 data ranks cannot share evenly.*=128"),
        ({"parallel": {"cpu_offload": True, "replicate": 2}}, "needs shard of 2 or more"),
        ({"optim": {"name": "muon_adamw_2026"}}, "trains whole matrices only"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    found = ranks(2).run(run, tiny(tmp_path, "bad", **changes))
    for answer in found:
        with pytest.raises(UserError, match=f"(?s){said}"):
            raise UserError(str(answer))


def test_meshes_of_a_world() -> None:
    assert degrees(ParallelSection(tensor=2), 8).shard == 4
    assert degrees(ParallelSection(replicate=2, tensor=2), 8).data == 4
    with pytest.raises(UserError, match=r"(?s)pipeline=3 .*does not make 8 ranks") as error:
        degrees(ParallelSection(pipeline=3), 8)
    meshes = str(error.value).splitlines()[1:]
    assert "  pipeline=2 replicate=2 shard=2" in meshes
    assert len(meshes) == len(set(meshes)) == 10
    with pytest.raises(UserError, match=r"expert=3 does not fit .*use one of 1, 2, 4, 8"):
        degrees(ParallelSection(expert=3), 8)


def test_reinforcement_learning_shares_the_prompts(tmp_path: Path) -> None:
    sharded = ranks(2).run(run, recipe(tmp_path, "rl", run={"name": "sharded"}, train={"length": "2 steps"}))
    alone = launch(recipe(tmp_path, "rl", run={"name": "alone"}, train={"length": "2 steps"}))
    first, second = (
        [json.loads(line) for line in (o.run / "metrics.jsonl").read_text().splitlines()] for o in (sharded[0], alone)
    )
    for ours, theirs in zip(first, second, strict=True):  # the same prompts, seeds and weights: the same answers
        assert ours["rl/reward"] == pytest.approx(theirs["rl/reward"])
        assert ours["rl/length"] == pytest.approx(theirs["rl/length"])
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], abs=1e-4)
