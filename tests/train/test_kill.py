"""kill -9 at random moments of every stage, then resume: the end is bit-equal to that of an undisturbed run."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nanoworks.config import load_recipe, to_yaml
from nanoworks.train.launch import launch
from tests.train.test_trainer import STAGES, assert_same_end, metrics_of
from tests.train.tiny import recipe

LENGTH = {"pretrain": 60, "midtrain": 60, "sft": 60, "rl": 20}


def _launch(path: str, log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    launch(load_recipe(path, environ={}), resume=True)


def run(file: Path, log: Path, moment: Callable[[], bool] | None = None) -> int:
    """Run the recipe in a process of its own, killed when `moment` says so; return its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch._dynamo", "nanoworks.train.launch", "nanoworks.tasks.microworld", "tests.train.tiny"]
    )
    process = context.Process(target=_launch, args=(str(file), str(log)))
    process.start()
    while moment is not None and process.is_alive():
        if moment():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            break
        time.sleep(0.001)
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def random_moment(generator: random.Random, metrics: Path, steps: float) -> Callable[[], bool]:
    """A moment within about the next `steps` steps, anywhere between two of them (a save, for instance)."""

    def lines() -> int:
        return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0

    target, delay = lines() + generator.uniform(-4, steps), generator.uniform(0, 0.05)
    reached: list[float] = []

    def come() -> bool:
        if not reached and lines() >= target:
            reached.append(time.perf_counter())
        return bool(reached) and time.perf_counter() > reached[0] + delay

    return come


def check_stage(root: Path, stage: str, kills: int, seed: int) -> None:
    length, log = LENGTH[stage], root / "log"
    files = {}
    for name in (stage, "killed"):
        values = recipe(root, stage, run={"name": name}, train={"length": f"{length} steps"}, checkpoint={"every": 4})
        files[name] = root / f"{name}.yaml"
        files[name].write_text(to_yaml(values))
    assert run(files[stage], log) == 0, log.read_text()
    generator, left = random.Random(seed), kills
    while left:
        metrics = root / "runs" / "killed" / "metrics.jsonl"
        code = run(files["killed"], log, random_moment(generator, metrics, 2 * length / kills))
        assert code in (0, -signal.SIGKILL), log.read_text()
        if code == 0:  # it came to its end between two kills: begin anew, until every kill was a real one
            check_end(root, stage, length)
            shutil.rmtree(root / "runs" / "killed")
        else:
            left -= 1
    assert run(files["killed"], log) == 0, log.read_text()
    check_end(root, stage, length)


def check_end(root: Path, stage: str, length: int) -> None:
    assert_same_end(root / "runs" / stage, root / "runs" / "killed")
    assert [r["step"] for r in metrics_of(root / "runs" / "killed")] == list(range(1, length + 1))


@pytest.mark.parametrize("stage", STAGES)
def test_two_kills(tmp_path: Path, stage: str) -> None:
    check_stage(tmp_path, stage, kills=2, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("stage", STAGES)
def test_twenty_kills(tmp_path: Path, stage: str) -> None:
    check_stage(tmp_path, stage, kills=20, seed=1)
