"""Runs under the real torchrun: killed and hung ranks, a signal to the launcher, and the stages of the demo. Slow,
because every start of a process costs seconds; tests/parallel/test_watch.py has the same in ranks that are there."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from nanoworks.checkpoint import steps_of
from nanoworks.config import Recipe, to_yaml
from tests.parallel.test_launch import tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STEPS = 120


@contextmanager
def torchrun(log: Path, *arguments: object, restarts: int = 0) -> Iterator[subprocess.Popen[bytes]]:
    """A launcher of two ranks, which writes to `log`; it and its ranks are gone at the end."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--monitor-interval", "0.2"]
    command += ["--max-restarts", str(restarts), *map(str, arguments)]
    with log.open("ab") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        process = subprocess.Popen([sys.executable, *command], stdout=output, stderr=output, env=environment)
    try:
        yield process
    finally:
        left = [process.pid, *(p.pid for p in ranks_of(process))]
        for pid in left:
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def ranks_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children()
    except psutil.NoSuchProcess:
        return []


def write(recipe: Recipe, file: Path) -> Path:
    file.write_text(to_yaml(recipe))
    return file


def rows(run: Path) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, "the launcher ended too early"
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.002)


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last step, of the model and of what resuming needs."""
    step = steps_of(run)[-1]
    return {
        f"{file.relative_to(step)}:{name}": tensor
        for file in sorted(step.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_same_end(run: Path, other: Path) -> None:
    assert steps_of(run)[-1].name == steps_of(other)[-1].name == f"step-{STEPS:06d}"
    ours, theirs = tensors(run), tensors(other)
    assert ours.keys() == theirs.keys()
    assert any("optimizer" in name for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [r["step"] for r in rows(other) if "train/loss" in r] == list(range(1, STEPS + 1))


def long(root: Path, name: str, **changes: Any) -> Path:
    """The file of a recipe of many short steps."""
    values: dict[str, Any] = {"checkpoint": {"every": 4}, "train": {"length": f"{STEPS} steps", "micro_batch_size": 1}}
    return write(tiny(root, name, eval={"every": 0}, **{**values, **changes}), root / f"{name}.yaml")


def kill_one(
    process: subprocess.Popen[bytes], known: set[int], generator: random.Random, run: Path, what: str
) -> set[int]:
    """Wait for two ranks beside the `known` ones and kill one of them: before it has begun, or within the next dozen
    steps (in a step, a save, or between them). Returns both."""
    wait_until(lambda: len({p.pid for p in ranks_of(process)} - known) == 2, process)
    both = sorted({p.pid for p in ranks_of(process)} - known)
    more, before = generator.uniform(-2, 12), len(rows(run))
    if more > 0:
        wait_until(lambda: len(rows(run)) >= before + more, process)
    time.sleep(generator.uniform(0, 0.1 if more > 0 else 8))
    victim = generator.choice(both)
    print(f"{what}: rank {both.index(victim)} after {len(rows(run))} lines of metrics")
    os.kill(victim, signal.SIGKILL)
    return set(both)


def test_ten_random_kills_end_as_an_undisturbed_run(tmp_path: Path) -> None:
    generator, runs = random.Random(7), tmp_path / "runs"
    with torchrun(tmp_path / "whole.log", "-m", "nanoworks", "train", long(tmp_path, "whole")) as process:
        assert process.wait(300) == 0, (tmp_path / "whole.log").read_text()
    log = tmp_path / "killed.log"
    with torchrun(log, "-m", "nanoworks", "train", long(tmp_path, "killed"), restarts=10) as process:
        known: set[int] = set()
        for number in range(1, 11):
            known |= kill_one(process, known, generator, runs / "killed", f"kill {number}")
        assert process.wait(300) == 0, log.read_text()
    assert log.read_text().count("resuming") >= 5
    assert_same_end(runs / "whole", runs / "killed")


HANGS_ONCE = """
import os, time
from nanoworks.train.supervised import Pretrain
from nanoworks.cli.main import main

calls, loss = 0, Pretrain.loss

def sometimes(self, model, batch):
    global calls
    calls += 1
    if calls == 41 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        time.sleep(600)
    return loss(self, model, batch)

Pretrain.loss = sometimes
main()
"""


def test_a_hung_rank_is_named_and_the_run_goes_on(tmp_path: Path) -> None:
    script, log = tmp_path / "hangs_once.py", tmp_path / "hung.log"
    script.write_text(HANGS_ONCE)
    runs = tmp_path / "runs"
    with torchrun(tmp_path / "whole.log", "-m", "nanoworks", "train", long(tmp_path, "whole")) as process:
        assert process.wait(300) == 0, (tmp_path / "whole.log").read_text()
    recipe = long(tmp_path, "hung", parallel={"timeout_minutes": 0.1})
    with torchrun(log, script, "train", recipe, restarts=1) as process:
        assert process.wait(300) == 0, log.read_text()
    assert (
        "error: rank 1 hangs: the others wait for it in a communication and it is at hangs_once.py" in log.read_text()
    )
    assert "exitcode  : 4" in log.read_text() or "exitcode: 4" in log.read_text()
    assert "in sometimes" in (runs / "hung" / "logs" / "rank-001.log").read_text()
    assert_same_end(runs / "whole", runs / "hung")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_saves_and_ends_all(tmp_path: Path, number: signal.Signals) -> None:
    run, log = tmp_path / "runs" / "long", tmp_path / "log"
    changes = {"checkpoint": {"every": 0}, "train": {"length": "100000 steps", "micro_batch_size": 1}}
    with torchrun(log, "-m", "nanoworks", "train", long(tmp_path, "long", **changes)) as process:
        wait_until(lambda: len(rows(run)) > 3, process)
        process.send_signal(number)
        process.wait(100)
    steps = steps_of(run)
    assert [p.name for p in steps] == [f"step-{rows(run)[-1]['step']:06d}"], log.read_text()
    assert json.loads((run / "run.json").read_text())["status"] == "stopped"


def test_the_demo_runs_unchanged_on_two_ranks(tmp_path: Path) -> None:
    """Its four stages, tasks, report and chat, each a few steps long; RL included, where every rank samples."""
    chat = ["microworld_arithmetic", "microworld_identity"]
    base = {
        "stage": "pretrain",
        "tokenizer": "set by the pipeline",
        "model": {"model_type": "nanochat", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        "hardware": {"device": "cpu", "dtype": "float32", "threads": 1},
        "data": {
            "sequence_length": 128,
            "train": [{"name": "microworld", "pages": 2}],
            "validation": [{"name": "microworld", "pages": 1}],
            "buffer": 20,
        },
        "train": {
            "length": "4 steps",
            "tokens_per_step": 512,
            "micro_batch_size": 2,
            "sample_every": 2,
            "sample_tokens": 4,
            "sample_prompts": ["The emblem of"],
        },
        "eval": {"every": 2, "max_tokens": 4, "tokens": 500, "tasks": [{"name": name, "limit": 4} for name in chat]},
        "checkpoint": {"every": 2},
    }
    later = {**base, "data": {**base["data"], "train": chat, "validation": []}}  # type: ignore[dict-item]
    rl = {"name": "rl", "tasks": [{"name": chat[0]}], "prompts_per_step": 2, "samples_per_prompt": 2}
    stages: dict[str, dict[str, Any]] = {
        "pretrain": base,
        "midtrain": {**later, "stage": "midtrain"},
        "sft": {**later, "stage": "sft"},
        "rl": {**later, "stage": {**rl, "max_new_tokens": 8}, "data": {**later["data"], "train": []}},
    }
    for name, values in stages.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
    pipeline = {
        "name": "tiny",
        "tokenizer": {"vocab_size": 400, "characters": 50_000, "data": [{"name": "microworld", "pages": 2}]},
        "stages": [f"{name}.yaml" for name in stages],
        "prompts": ["Who are you?"],
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(pipeline))
    log, out = tmp_path / "log", tmp_path / "runs"
    arguments = ["-m", "nanoworks", "demo", "--recipe", tmp_path / "tiny.yaml", "--out", out]
    with torchrun(log, *arguments) as process:
        assert process.wait(300) == 0, log.read_text()
    said = log.read_text()
    for name in stages:
        assert json.loads((out / name / "run.json").read_text())["status"] == "finished"
        assert said.count(f"{name} done after") == 1
        assert any("eval/microworld_arithmetic" in row for row in rows(out / name)), name
        assert sorted(p.name for p in (out / name / "logs").glob("*.log")) == ["rank-000.log", "rank-001.log"]
    assert said.count("The whole demo took") == 1
    assert "failed and is left out" not in said
    assert (out / "rl" / "report.md").is_file()
