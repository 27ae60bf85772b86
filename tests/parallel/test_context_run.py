"""Whole runs on ranks that share the tokens of rows: the same figures as in one process, saved, resumed, bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from nanoworks.config import Recipe
from nanoworks.tasks.microworld import Identity
from nanoworks.train.launch import launch
from tests.parallel.ranks import ranks
from tests.parallel.test_launch import LLAMA, MIXTRAL, run, weights
from tests.parallel.test_launch import tiny as recipe_of
from tests.train.tiny import recipe

MOE = {"bias_update_rate": 0.01, "balance_coef": 0.02, "z_loss_coef": 0.01, "capacity_factor": 1.2}


@pytest.mark.parametrize(
    ("n", "parallel", "changes"),
    [
        (2, {"context": 2}, {"model": MIXTRAL, "moe": MOE, "data": {"document_mask": True}}),
        pytest.param(2, {"context": 2, "context_method": "ulysses"}, {"model": LLAMA}, marks=pytest.mark.slow),
        pytest.param(4, {"context": 2, "shard": 2}, {"model": LLAMA}, marks=pytest.mark.slow),
    ],
)
def test_a_run_is_that_of_one_process(
    tmp_path: Path, n: int, parallel: dict[str, Any], changes: dict[str, Any]
) -> None:
    optim = {"optim": {"name": "adamw", "lr": 1e-3}}
    whole = recipe_of(tmp_path, "alone", parallel={**parallel, "context": 1}, **optim, **changes)
    alone = launch(whole).run if n == 2 else ranks(n // 2).run(run, whole)[0].run  # by ranks that read the same rows
    together = ranks(n).run(run, recipe_of(tmp_path, "together", parallel=parallel, **optim, **changes))[0].run
    rows = [[json.loads(line) for line in (d / "metrics.jsonl").read_text().splitlines()] for d in (together, alone)]
    for ours, theirs in zip(*rows, strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            if name.partition("/")[0] == "moe" or name in ("train/loss", "train/grad_norm", "val/loss", "train/tokens"):
                assert ours[name] == pytest.approx(theirs[name], abs=2e-5, rel=2e-5), name
    torch.testing.assert_close(weights(together), weights(alone), atol=2e-5, rtol=1e-4)


def cut(recipe: Recipe) -> str:
    return str(run(recipe, event="power cut", at=5))


def resume(recipe: Recipe) -> Any:
    return run(recipe, resume=True)


@pytest.mark.slow
def test_a_run_resumes_to_the_bit_and_goes_on_alone(tmp_path: Path) -> None:
    values = {"optim": {"name": "muon_adamw"}, "model": MIXTRAL, "parallel": {"context": 2}}
    expected = weights(ranks(2).run(run, recipe_of(tmp_path, "whole", **values))[0].run)
    for name in ("again", "alone"):
        assert "power cut" in ranks(2).run(cut, recipe_of(tmp_path, name, **values))[0]
    again = weights(ranks(2).run(resume, recipe_of(tmp_path, "again", **values))[0].run)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.items())
    alone = launch(recipe_of(tmp_path, "alone", **{**values, "parallel": {}}), resume=True)
    torch.testing.assert_close(weights(alone.run), expected, atol=2e-4, rtol=1e-2)


def rewarded(recipe: Recipe) -> Any:
    """A run in which some answers are better than others."""
    with mock.patch.object(Identity, "score", lambda self, i, text: float(len(text) % 3)):
        return run(recipe) if torch.distributed.is_initialized() else launch(recipe)


@pytest.mark.slow
def test_reinforcement_learning(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "train": {"length": "3 steps"},
        "model": {**LLAMA, "max_position_embeddings": 512},
        "optim": {"name": "adamw", "lr": 1e-3},
    }
    alone = rewarded(recipe(tmp_path, "rl", run={"name": "alone"}, **values)).run
    shared = recipe(tmp_path, "rl", run={"name": "shared"}, parallel={"context": 2}, **values)
    together = ranks(2).run(rewarded, shared)[0].run
    rows = [[json.loads(line) for line in (d / "metrics.jsonl").read_text().splitlines()] for d in (together, alone)]
    assert all(row["train/grad_norm"] > 0 for row in rows[1])
    for ours, theirs in zip(*rows, strict=True):
        for name in ("rl/reward", "rl/length", "train/loss", "train/grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], abs=2e-5, rel=2e-5), name
    torch.testing.assert_close(weights(together), weights(alone), atol=2e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["all_gather", "ulysses"])
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_layers(tmp_path: Path, method: str) -> None:
    plain: dict[str, Any] = {"model": LLAMA, "train": {"length": "3 steps"}, "optim": {"name": "adamw", "lr": 1e-3}}
    expected = weights(launch(recipe_of(tmp_path, "alone", **plain)).run)
    hardware = {"device": "cpu", "dtype": "float32", "threads": 1, "compile": True}
    parallel = {"context": 2, "context_method": method}
    compiled = recipe_of(tmp_path, "compiled", parallel=parallel, hardware=hardware, **plain)
    found = weights(ranks(2).run(run, compiled, timeout=300)[0].run)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_rows_that_cannot_be_shared(tmp_path: Path) -> None:
    values = {"parallel": {"context": 2}, "data": {"sequence_length": 62}, "train": {"tokens_per_step": 62 * 4}}
    said = str(ranks(2).run(run, recipe_of(tmp_path, "odd", model=LLAMA, **values))[0])
    assert "rows of 62 tokens cannot be cut into 4 equal parts; set data.sequence_length=60" in said
