"""Whole runs that save: in a thread, with a disk that fills, killed half-way, without a shard, whole or in parts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nanoworks.checkpoint import load_state, steps_of
from nanoworks.common.errors import UserError
from nanoworks.config import Recipe
from nanoworks.parallel.native import Native
from nanoworks.train import saving
from nanoworks.train.launch import launch
from nanoworks.train.trainer import Trainer
from tests.parallel.ranks import RankError, ranks
from tests.train.tiny import recipe

MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 3,  # which no number of ranks here divides
    "num_hidden_layers": 2,
}


def tiny_run(root: Path, name: str, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "run": {"name": name},
        "train": {"length": "6 steps", "micro_batch_size": 1},
        "checkpoint": {"every": 2, "keep_last": 5, "async_save": True},
        "model": MIXTRAL,
    }
    return recipe(root, **{**values, **changes})


def run(recipe: Recipe, *, resume: bool = False, late: bool = False, full_at: int = 0, killed_at: int = 0) -> Any:
    """`launch` on this rank. `late`: the thread writes no step before training is past the next one; `full_at`: the
    disk of rank 1 is full at this step; `killed_at`: rank 0 is killed when half of this step is written."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    step, write = Trainer._step, saving.save_parts
    moved = threading.Event()

    def counting(self: Trainer, batches: Any) -> None:
        step(self, batches)
        if self.progress.step % 2:
            moved.set()

    def waiting(directory: Path, tensors: Any, group: Any) -> None:
        if late and "000006" not in str(directory):
            assert moved.wait(20)
        if full_at and rank == 1 and f"{full_at:06d}" in str(directory):
            tensors = {**tensors, "x": _Unwritable()}
        write(directory, tensors, group)
        if killed_at and rank == 0 and f"{killed_at:06d}" in str(directory):
            os.kill(os.getpid(), signal.SIGKILL)

    def collect(self: saving.Saver, progress: Any) -> Any:
        moved.clear()
        return old(self, progress)

    old = saving.Saver._collect
    Trainer._step, saving.save_parts, saving.Saver._collect = counting, waiting, collect  # type: ignore[method-assign]
    try:
        return launch(recipe, resume=resume)
    except UserError as error:
        return str(error)
    finally:
        Trainer._step, saving.save_parts, saving.Saver._collect = step, write, old  # type: ignore[method-assign]
        os.environ.pop("WORLD_SIZE")


class _Unwritable:
    def __getattr__(self, name: str) -> Any:
        raise OSError(28, "No space left on device")


def _late(recipe: Recipe) -> Any:
    return run(recipe, late=True)


def _full(recipe: Recipe) -> Any:
    return run(recipe, full_at=4)


def _nameless(recipe: Recipe) -> Any:
    """The first rank has no room for the Hugging Face directory."""
    write = saving.write_model

    def full(directory: Path, *args: Any, **options: Any) -> None:
        if "000004" in str(directory):
            raise OSError(28, "No space left on device")
        write(directory, *args, **options)

    saving.write_model = full
    try:
        return run(recipe)
    finally:
        saving.write_model = write


def _whole(recipe: Recipe, resume: bool) -> Any:
    """Ranks that give their tensors whole, as those of DeepSpeed do."""
    Native.in_parts = False
    try:
        return run(recipe, resume=resume)
    finally:
        Native.in_parts = True


def _killed(recipe: Recipe) -> Any:
    return run(recipe, killed_at=4)


def _resume(recipe: Recipe) -> Any:
    return run(recipe, resume=True)


def contents(step: Path) -> dict[str, Tensor]:
    state, _ = load_state(step / "state")
    with state:
        return load_file(step / "model.safetensors") | dict(state)


def unfinish(folder: Path) -> None:
    info = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**info, "status": "running"}))


def test_a_thread_writes_the_moment_of_the_save_whatever_training_does(tmp_path: Path) -> None:
    for name, function, changes in (
        ("at-once", run, {"checkpoint": {"every": 2, "keep_last": 5}}),
        ("late", _late, {}),
    ):
        assert ranks(2).run(function, tiny_run(tmp_path, name, **changes))[0].finished
    ours, theirs = (steps_of(tmp_path / "runs" / name) for name in ("at-once", "late"))
    assert [p.name for p in ours] == [p.name for p in theirs] == ["step-000002", "step-000004", "step-000006"]
    for a, b in zip(ours, theirs, strict=True):
        first, second = contents(a), contents(b)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert sorted(p.name for p in (b / "state").iterdir()) == sorted(p.name for p in (a / "state").iterdir())
        assert not (b / "weights").exists()
    rows = [json.loads(line) for line in (tmp_path / "runs/late/metrics.jsonl").read_text().splitlines()]
    stalls = [row["checkpoint/stall_ms"] for row in rows if "checkpoint/stall_ms" in row]
    assert len(stalls) == 3
    assert all(stall > 0 for stall in stalls)


@pytest.mark.parametrize(
    ("function", "rank"), [(_full, 1), pytest.param(_nameless, 0, marks=pytest.mark.slow)], ids=["parts", "name"]
)
def test_a_thread_that_cannot_write_ends_the_run_and_leaves_the_step_before(
    tmp_path: Path, function: Any, rank: int
) -> None:
    said = ranks(2).run(function, tiny_run(tmp_path, "full"))
    assert all(f"rank {rank}: OSError" in s and "No space left" in s for s in said), said
    folder = tmp_path / "runs" / "full"
    assert sorted(p.name for p in folder.glob("*step*")) == ["step-000002"]
    assert all(outcome.finished for outcome in ranks(2).run(_resume, tiny_run(tmp_path, "full")))


@pytest.mark.slow
def test_a_rank_killed_while_it_writes_leaves_the_step_before(tmp_path: Path) -> None:
    assert ranks(2).run(run, tiny_run(tmp_path, "whole"))[0].finished
    with pytest.raises(RankError):
        ranks(2).run(_killed, tiny_run(tmp_path, "killed"))
    folder = tmp_path / "runs" / "killed"
    assert [p.name for p in steps_of(folder)] == ["step-000002"]
    assert (folder / ".step-000004.partial").is_dir()
    assert all(outcome.finished for outcome in ranks(2).run(_resume, tiny_run(tmp_path, "killed")))
    assert not list(folder.glob(".*"))
    ours, theirs = (contents(steps_of(tmp_path / "runs" / name)[-1]) for name in ("whole", "killed"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_resuming_where_a_shard_is_missing_names_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = tiny_run(tmp_path, "gone", train={"length": "2 steps", "micro_batch_size": 1})
    assert ranks(2).run(run, recipe)[0].finished
    folder = tmp_path / "runs" / "gone"
    [step] = steps_of(folder)
    shard = next((step / "state").glob("shard-00002-*"))
    shard.unlink()
    unfinish(folder)
    with pytest.raises(UserError, match=f"no step that is whole: .*{shard.name} is missing"):
        launch(recipe, resume=True)
    assert shard.name in caplog.text


def test_one_process_may_save_in_a_thread_too(tmp_path: Path) -> None:
    for name, changes in (("at-once", {"checkpoint": {"every": 2, "keep_last": 5}}), ("thread", {})):
        assert launch(tiny_run(tmp_path, name, **changes)).finished
    for a, b in zip(*(steps_of(tmp_path / "runs" / name) for name in ("at-once", "thread")), strict=True):
        first, second = contents(a), contents(b)
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_parts_and_wholes_go_into_each_other(tmp_path: Path) -> None:
    assert all("set checkpoint.async_save=false" in s for s in ranks(2).run(_whole, tiny_run(tmp_path, "no"), False))
    at_once = {"checkpoint": {"every": 2, "keep_last": 5}}
    for name, first, then in (("parts", (run,), (_whole, True)), ("wholes", (_whole, False), (_resume,))):
        recipe, folder = tiny_run(tmp_path, name, **at_once), tmp_path / "runs" / name
        function, *more = first
        assert ranks(2).run(function, recipe, *more)[0].finished
        ended = contents(folder / "step-000006")
        assert (folder / "step-000004/state/tensors.safetensors").is_file() == (name == "wholes")
        shutil.rmtree(folder / "step-000006")
        unfinish(folder)
        function, *more = then
        assert ranks(2).run(function, recipe, *more)[0].finished
        again = contents(folder / "step-000006")
        assert ended.keys() == again.keys()
        assert all(torch.equal(ended[tensor], again[tensor]) for tensor in ended)
