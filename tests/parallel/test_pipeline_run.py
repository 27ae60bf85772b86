"""Whole runs on the ranks of a pipeline: the same figures as in one process, saved, resumed, and bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nanoworks.checkpoint import load_checkpoint, steps_of
from nanoworks.config import Recipe
from nanoworks.config.parallel import ParallelSection
from nanoworks.parallel.mesh import Degrees
from nanoworks.parallel.support import refusal
from nanoworks.train.launch import launch
from tests.parallel.ranks import ranks
from tests.parallel.test_launch import run
from tests.train.tiny import recipe

SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
MIXTRAL = {**SMALL, "model_type": "mixtral", "num_local_experts": 4, "num_hidden_layers": 4}
TIED = {**SMALL, "model_type": "llama", "num_hidden_layers": 4, "tie_word_embeddings": True}
MOE = {"bias_update_rate": 0.01, "balance_coef": 0.02, "capacity_factor": 1.2, "router_lr_fraction": 0.5}


def tiny(root: Path, name: str, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "run": {"name": name},
        "model": MIXTRAL,
        "moe": MOE,
        "optim": {"name": "adamw", "lr": 1e-3},
        "train": {"length": "6 steps", "micro_batch_size": 1, "sample_prompts": ["the cat"], "sample_tokens": 4},
        "eval": {"every": 3, "tokens": 1024},
        "data": {"validation": [{"name": "jsonl", "path": str(root / "corpus.jsonl")}]},
    }
    return recipe(root, **{**values, **changes})


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def rows(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(steps_of(directory)[-1] / "model.safetensors")


def _cut(recipe: Recipe) -> Any:
    return run(recipe, event="power cut", at=5)


def _resume(recipe: Recipe) -> Any:
    return run(recipe, resume=True)


@pytest.mark.parametrize(
    ("n", "parallel", "changes"),
    [
        (2, {}, {}),
        slow(2, {"pipeline_schedule": "zbv"}, {}),
        slow(4, {"pipeline_schedule": "interleaved_1f1b"}, {}),
        slow(4, {"replicate": 2, "shard": 1}, {}),
        slow(4, {}, {"model": TIED, "moe": {}}),
        slow(
            2,
            {"pipeline_schedule": "gpipe"},
            {"model": TIED, "moe": {}, "checkpoint": {"every": 3, "async_save": True}},
        ),
    ],
    ids=["1f1b", "zbv", "interleaved x FSDP2", "1f1b x DDP", "tied x FSDP2", "tied, saved in a thread"],
)
def test_a_run_is_that_of_one_process_and_resumes_to_the_bit(
    tmp_path: Path, n: int, parallel: dict[str, Any], changes: dict[str, Any]
) -> None:
    parallel = {"pipeline": 2, **parallel}
    data = {**parallel, "pipeline": 1}  # the ranks that read the same rows, each with a whole model
    reference = tiny(tmp_path, "alone", parallel=data, **changes)
    alone = launch(reference).run if n == 2 else ranks(n // 2).run(run, reference)[0].run
    whole, cut = (tiny(tmp_path, name, parallel=parallel, **changes) for name in ("whole", "cut"))
    outcomes = ranks(n).run(run, whole)
    assert [(o.finished, o.is_main) for o in outcomes] == [(True, rank == 0) for rank in range(n)]
    directory = outcomes[0].run
    for ours, theirs in zip(rows(directory), rows(alone), strict=True):
        assert ours.keys() - theirs.keys() == ({"pipeline/bubble", "pipeline/bubble_expected"} & ours.keys())
        for name in ours.keys() & theirs.keys():
            if name.partition("/")[0] == "moe" or name in ("train/loss", "train/grad_norm", "val/loss", "train/tokens"):
                assert ours[name] == pytest.approx(theirs[name], abs=2e-5, rel=2e-5), name
    assert all(0 <= row["pipeline/bubble"] < 1 for row in rows(directory) if "train/loss" in row)
    assert (directory / "samples.jsonl").read_text() == (alone / "samples.jsonl").read_text()
    if "moe" not in changes:
        assert (directory / "experts.jsonl").read_text() == (alone / "experts.jsonl").read_text()
    expected = tensors(alone)
    assert list(tensors(directory)) == list(expected)
    torch.testing.assert_close(tensors(directory), expected, atol=2e-5, rtol=1e-4)
    assert load_checkpoint(directory).model.num_parameters() == sum(t.numel() for t in expected.values())

    assert "power cut" in ranks(n).run(_cut, cut)[0]
    assert ranks(n).run(_resume, cut)[0].finished
    resumed = tensors(directory.with_name("cut"))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in tensors(directory).items())


@pytest.mark.slow
def test_a_run_goes_on_elsewhere(tmp_path: Path) -> None:
    """Pipeline of 2 -> one process, and one process -> pipeline of 2: the same end, but for rounding."""
    expected = tensors(launch(tiny(tmp_path, "alone")).run)
    for name, first, second in (("out", 2, 1), ("in", 1, 2)):
        parts = {n: tiny(tmp_path, name, parallel={"pipeline": n} if n > 1 else {}) for n in (1, 2)}
        assert "power cut" in str(ranks(first).run(_cut, parts[first])[0])
        assert ranks(second).run(_resume, parts[second])[0].finished
        torch.testing.assert_close(tensors(tmp_path / "runs" / name), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_layers(tmp_path: Path) -> None:
    plain = {"model": {**TIED, "tie_word_embeddings": False}, "moe": {}, "train": {"length": "3 steps"}, "eval": {}}
    expected = tensors(launch(tiny(tmp_path, "alone", **plain)).run)
    values = {"device": "cpu", "dtype": "float32", "threads": 1, "compile": True}
    compiled = tiny(tmp_path, "compiled", parallel={"pipeline": 2}, hardware=values, **plain)
    assert ranks(2).run(run, compiled, timeout=300)[0].finished
    torch.testing.assert_close(tensors(tmp_path / "runs" / "compiled"), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parallel": {"pipeline": 2}, "model": {**MIXTRAL, "num_hidden_layers": 1}}, "take at most 1 stages"),
        ({"parallel": {"pipeline": 2}, "train": {"length": "2 steps", "tokens_per_step": 64}}, "Counts that do: 2, 3"),
        (
            {
                "parallel": {"pipeline": 2},
                "model": {**SMALL, "model_type": "nanochat_2026", "num_hidden_layers": 2},
                "moe": {},
            },
            "cannot be cut into pipel",
        ),
    ],
    ids=["layers", "micro-batches", "family"],
)
def test_what_a_pipeline_cannot_do_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    for answer in ranks(2).run(run, tiny(tmp_path, "bad", **changes)):
        assert "UserError" in answer
        assert said in answer


def test_reinforcement_learning_is_refused(tmp_path: Path) -> None:
    for answer in ranks(2).run(run, recipe(tmp_path, "rl", parallel={"pipeline": 2})):
        assert "UserError" in answer
        assert "does not train on the ranks of a pipeline" in answer


@pytest.mark.parametrize(
    ("section", "compile", "said"),
    [
        ({"tensor": 2}, False, "pipeline with tensor is not built"),
        ({"cpu_offload": True}, False, "cpu_offload with pipeline"),
        ({"pipeline_schedule": "zbv"}, True, "a compiled layer only once; use interleaved_1f1b"),
        ({"pipeline_schedule": "interleaved_zero_bubble"}, True, "hardware.compile=false"),
        ({"pipeline_schedule": "interleaved_1f1b"}, True, None),
        ({"pipeline_schedule": "zbv"}, False, "checkpointing none or full"),
    ],
)
def test_what_does_not_go_together(section: dict[str, Any], compile: bool, said: str | None) -> None:
    asked = ParallelSection(pipeline=2, **section)
    reason = refusal(
        asked, Degrees(pipeline=2, shard=2, tensor=asked.tensor), compile=compile, checkpointing="selective"
    )
    assert (said is None and reason is None) or str(said) in str(reason)
