"""kill -9 at random moments of every stage, then resume: the end is bit-equal to that of an undisturbed run."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from nanoworks.config import Recipe, load_recipe, to_yaml
from nanoworks.train.launch import launch
from tests.train.test_trainer import STAGES, assert_same_end, metrics_of
from tests.train.tiny import recipe

LENGTH = {"pretrain": 60, "midtrain": 60, "sft": 60, "rl": 20}


def _launch(path: str, log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    launch(load_recipe(path, environ={}), resume=True)


def run_killed(file: Path, log: Path, after: float | None) -> int:
    """Run the recipe in a process of its own and kill it after so many seconds; return its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nanoworks.train.launch", "tests.train.tiny"])
    process = context.Process(target=_launch, args=(str(file), str(log)))
    process.start()
    process.join(120 if after is None else after)
    if process.is_alive():
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert process.exitcode is not None
    return process.exitcode


def check_stage(root: Path, stage: str, kills: int, seed: int) -> None:
    length = LENGTH[stage]
    reference = recipe(root, stage, train={"length": f"{length} steps"}, checkpoint={"every": 4})
    killed: Recipe = recipe(
        root, stage, run={"name": "killed"}, train={"length": f"{length} steps"}, checkpoint={"every": 4}
    )
    files = {}
    for name, values in (("reference", reference), ("killed", killed)):
        files[name] = root / f"{name}.yaml"
        files[name].write_text(to_yaml(values))
    log = root / "log"
    assert run_killed(files["reference"], log, None) == 0, log.read_text()
    started = time.perf_counter()
    run_killed(files["reference"], log, None)  # finished already: what starting up costs
    startup = time.perf_counter() - started
    rows = metrics_of(root / "runs" / stage)
    training = rows[-1]["time"] - rows[0]["time"]
    generator = random.Random(seed)
    left = kills
    while left:
        moment = startup * 0.5 + generator.uniform(0, startup * 0.5 + 2 * training / kills)
        code = run_killed(files["killed"], log, moment)
        assert code in (0, -signal.SIGKILL), log.read_text()
        if code == 0:  # it came to its end between two kills: begin anew, until every kill was a real one
            check_end(root, stage, length)
            shutil.rmtree(root / "runs" / "killed")
        else:
            left -= 1
    assert run_killed(files["killed"], log, None) == 0, log.read_text()
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
