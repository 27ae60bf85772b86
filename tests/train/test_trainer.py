"""The promises of the training loop: exact resume, never training silently wrong, never losing a run."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nanoworks.checkpoint import steps_of
from nanoworks.common.errors import UserError
from nanoworks.config import Recipe
from nanoworks.train.launch import launch
from nanoworks.train.plan import hardware
from nanoworks.train.stage import Loss
from nanoworks.train.supervised import Pretrain
from nanoworks.train.trainer import NonFinite, Trainer
from tests.train.tiny import recipe

STAGES = ("pretrain", "midtrain", "sft", "rl")


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_end(first: Path, second: Path) -> None:
    """Weights, optimizer state and data position of the last steps are bit-equal."""
    a, b = steps_of(first)[-1], steps_of(second)[-1]
    assert a.name == b.name
    for file in ("model.safetensors", "state/tensors.safetensors"):
        ours, theirs = load_file(a / file), load_file(b / file)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), f"{file}: {name}"
    states = [json.loads((d / "state/state.json").read_text())["progress"] for d in (a, b)]
    assert states[0]["data"] == states[1]["data"]
    metadata = [json.loads((d / "config.json").read_text())["nanoworks"] for d in (a, b)]
    assert metadata[0]["data_hash"] == metadata[1]["data_hash"] != ""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_trains_and_leaves_a_run_on_disk(root: Path, stage: str) -> None:
    outcome = launch(recipe(root, stage))
    assert outcome.finished
    run = outcome.run
    rows = metrics_of(run)
    assert [r["step"] for r in rows] == list(range(1, 13))
    assert all(math.isfinite(r["train/loss"]) and r["train/tokens_per_second"] > 0 for r in rows)
    assert [p.name for p in steps_of(run)] == ["step-000009", "step-000012"]  # keep_last: 2
    info = json.loads((run / "run.json").read_text())
    assert (info["status"], info["stage"], info["parent"]) == ("finished", stage, None)
    assert (run / "config.yaml").is_file()
    if stage == "pretrain":
        assert rows[-1]["train/loss"] < rows[0]["train/loss"]


@pytest.mark.parametrize("stage", STAGES)
def test_resume_is_bit_equal(root: Path, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launch(recipe(root, stage))
    step, cut = Trainer._step, recipe(root, stage, run={"name": "cut"})

    def interrupted(self: Trainer, batches: Any) -> None:
        if self.progress.step == 7:
            raise RuntimeError("power cut")
        step(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupted)
        with pytest.raises(RuntimeError, match="power cut"):
            launch(cut)
    assert launch(cut, resume=True).finished
    assert_same_end(root / "runs" / stage, root / "runs" / "cut")
    rows = metrics_of(root / "runs" / "cut")
    assert [r["step"] for r in rows] == list(range(1, 13))  # the lines of steps 7 is not there twice


def test_a_step_does_not_depend_on_how_it_is_cut(root: Path) -> None:
    losses = []
    for rows in (1, 2, 4):
        changed = recipe(root, run={"name": f"cut{rows}"}, train={"micro_batch_size": rows, "length": "3 steps"})
        losses.append([r["train/loss"] for r in metrics_of(launch(changed).run)])
    assert losses[0][0] == pytest.approx(losses[2][0], rel=1e-5)


def test_sigterm_saves_at_the_step_boundary_and_returns(root: Path) -> None:
    slow = recipe(root, train={"length": "100000 steps"}, checkpoint={"every": 0})

    def kill() -> None:
        file = root / "runs" / "pretrain" / "metrics.jsonl"
        while not (file.is_file() and file.stat().st_size > 1000):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=kill)
    thread.start()
    outcome = launch(slow)
    thread.join()
    assert not outcome.finished
    last = metrics_of(outcome.run)[-1]["step"]
    assert [p.name for p in steps_of(outcome.run)] == [f"step-{last:06d}"]
    assert json.loads((outcome.run / "run.json").read_text())["status"] == "stopped"


def test_non_finite_loss_stops_before_a_weight_changes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, calls = Pretrain.loss, []

    def poisoned(self: Pretrain, model: Any, batch: Any) -> Loss:
        calls.append(batch)
        result = loss(self, model, batch)
        return Loss(result.sum * float("nan")) if len(calls) == 11 else result

    monkeypatch.setattr(Pretrain, "loss", poisoned)
    with pytest.raises(NonFinite, match=r"loss of step 6 .*micro-batch 0.*step-000003"):
        launch(recipe(root))
    run = root / "runs" / "pretrain"
    assert [p.name for p in steps_of(run)] == ["step-000003"]
    kept = load_file(run / "nonfinite-step-000006.safetensors")
    assert torch.equal(kept["tokens"], calls[10].tokens)
    assert all(t.isfinite().all() for t in load_file(run / "step-000003/model.safetensors").values())


def test_non_finite_gradient_stops_too(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = Pretrain.loss

    def poisoned(self: Pretrain, model: Any, batch: Any) -> Loss:
        model.embed_tokens.weight.register_hook(lambda grad: grad * float("inf"))
        return loss(self, model, batch)

    monkeypatch.setattr(Pretrain, "loss", poisoned)
    with pytest.raises(NonFinite, match="gradient norm of step 1"):
        launch(recipe(root))


def test_a_fully_masked_step_contributes_zero(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    loss = Pretrain.loss

    def masked(self: Pretrain, model: Any, batch: Any) -> Loss:
        return loss(self, model, replace(batch, weights=torch.zeros_like(batch.weights)))

    monkeypatch.setattr(Pretrain, "loss", masked)
    run = launch(recipe(root, train={"length": "2 steps"})).run
    assert [r["train/loss"] for r in metrics_of(run)] == [0.0, 0.0]
    assert [r["train/grad_norm"] for r in metrics_of(run)] == [0.0, 0.0]


def test_an_evaluation_that_fails_is_logged_and_training_goes_on(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: Pretrain) -> dict[str, float]:
        raise ZeroDivisionError("nothing to divide")

    monkeypatch.setattr(Pretrain, "evaluate", broken)
    with caplog.at_level(logging.WARNING, logger="nanoworks"):
        assert launch(recipe(root, eval={"every": 4})).finished
    assert sum("validation failed" in r.message for r in caplog.records) == 3


def test_an_existing_run_is_not_overwritten(root: Path) -> None:
    short = recipe(root, train={"length": "2 steps"})
    launch(short)
    with pytest.raises(UserError, match="--resume"):
        launch(short)
    assert launch(short, resume=True).finished  # finished already: nothing to do


def test_a_stage_starts_from_a_checkpoint_and_the_best_is_kept(root: Path) -> None:
    file = root / "corpus.jsonl"
    first = recipe(root)
    validation = [{"name": "jsonl", "path": str(file), "val_fraction": 0.1}]
    first = Recipe(
        **{
            **first.model_dump(),
            "data": {**first.data.model_dump(), "validation": validation, "train": validation},
            "eval": {"every": 3},
        }
    )
    parent = launch(first).run
    rows = [r for r in metrics_of(parent) if "val/bpb" in r]
    assert [r["step"] for r in rows] == [3, 6, 9, 12]
    assert all(0 < r["val/bpb"] < 10 for r in rows)
    second = recipe(root, "sft", init_from=str(parent), model=None, tokenizer=None, train={"length": "1 steps"})
    run = launch(second).run
    assert json.loads((run / "run.json").read_text())["parent"] == str(parent / "step-000012")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": {"name": "muon_adam"}}, r"unknown optimizer 'muon_adam' \(did you mean 'muon_adamw'\?\)"),
        ({"optim": {"name": "adamw", "lr_matrix": 1}}, r"optim\.lr_matrix: unknown key"),
        ({"schedule": {"name": "cosine", "warmup": 3}}, r"schedule\.warmup: unknown key \(did you mean"),
        ({"stage": {"name": "pretraining"}}, r"unknown stage 'pretraining' \(did you mean 'pretrain'\?\)"),
        ({"data": {"train": []}}, r"data\.train is empty"),
        ({"data": {"train": [{"name": "parket"}]}}, r"unknown .*'parket' \(did you mean 'parquet'\?\)"),
        ({"eval": {"tasks": [{"name": "gsm9k"}]}}, r"unknown task 'gsm9k' \(did you mean 'gsm8k'\?\)"),
        ({"trackers": ["jsnl"]}, r"unknown tracker 'jsnl' \(did you mean 'jsonl'\?\)"),
        (
            {"model": {"model_type": "nanochat", "dephth": 2}},
            r"model\.dephth: unknown key \(did you mean 'depth'\?\)",
        ),
        ({"model": {"model_type": "lama"}}, r"unknown model_type 'lama' \(did you mean 'llama'\?\)"),
        ({"model": {"num_attention_heads": 5}}, r"hidden_size 32 is not divisible by num_attention_heads 5"),
        ({"model": {"vocab_size": 290}}, r"the tokenizer has 300 tokens but the model only 290"),
        ({"data": {"sequence_length": 1024}}, r"longer than the model's context of 512"),
        ({"tokenizer": "/nonexistent"}, r"nonexistent"),
    ],
)
def test_bad_recipes_are_refused_before_anything_is_written(root: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        launch(recipe(root, **changes))
    assert not (root / "runs").exists()


def test_a_batch_that_cannot_fit_is_refused_with_the_one_that_would(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "memory_bytes", lambda device: 500 * 2**20)
    with pytest.raises(
        UserError, match=r"micro-batch of 100000 rows needs about .* GiB.*micro_batch_size=\d+ would fit"
    ):
        launch(recipe(root, train={"micro_batch_size": 100_000}))
    monkeypatch.setattr(hardware, "memory_bytes", lambda device: 100 * 2**20)
    with pytest.raises(UserError, match="not even one row fits"):
        launch(recipe(root))
