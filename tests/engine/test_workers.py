"""Tensor parallel: two processes give the tokens of one, end together, and say so when one of them fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanoworks.checkpoint import save_checkpoint
from nanoworks.common.errors import UserError
from nanoworks.engine import Engine, EngineConfig, SamplingParams, WorkerError, Workers
from nanoworks.models import Decoder
from tests.models.families import make

GREEDY = SamplingParams(max_tokens=16, temperature=0)
PROMPTS = [[1, 2, 3], list(range(40)), [7] * 9, [i * i % 91 for i in range(25)], list(range(40))]
FAMILIES = ["llama", "qwen3", "mistral", "mixtral"]
CPU = torch.device("cpu")


def saved(directory: Path, model: Decoder) -> Path:
    with save_checkpoint(directory, model, None, metadata={}):
        pass
    return directory


@pytest.fixture(scope="module")
def started() -> Iterator[list[Workers]]:
    """The processes of this file, the newest last."""
    groups: list[Workers] = []
    yield groups
    for group in groups:
        group.close()


@pytest.fixture
def workers(started: list[Workers]) -> Workers:
    """Two ranks; to start them takes seconds, so one pair serves until a test has broken it."""
    if not started or started[-1].failed:
        started.append(Workers(2, CPU))
    return started[-1]


def parallel(workers: Workers, path: Path, **config: object) -> Engine:
    model = workers.load(path, dtype=None).model
    return Engine(model, None, EngineConfig(tensor_parallel=2, **config), workers=workers)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_give_the_tokens_of_one(workers: Workers, tmp_path: Path, family: str) -> None:
    whole = make(family, intermediate_size=128)
    params = [GREEDY, replace(GREEDY, prompt_logprobs=True), *[replace(GREEDY, temperature=1.0, seed=5)] * 3]
    expected = Engine(whole, None).generate(PROMPTS, params)
    engine = parallel(workers, saved(tmp_path / "model", whole))
    for ours, theirs in zip(engine.generate(PROMPTS, params), expected, strict=True):
        assert ours[0].token_ids == theirs[0].token_ids
        assert ours[0].logprobs == pytest.approx(theirs[0].logprobs, abs=1e-5)
        assert ours[0].prompt_logprobs == pytest.approx(theirs[0].prompt_logprobs, abs=1e-5)
    share = sum(p.numel() for p in engine.model.layers.parameters())
    assert share < 0.62 * sum(p.numel() for p in whole.layers.parameters())


def test_chunks_forks_preemption_and_prefixes_change_nothing(workers: Workers, tmp_path: Path) -> None:
    whole = make("llama", intermediate_size=128)
    path = saved(tmp_path / "model", whole)
    crowd = [[5, *range(20), i] for i in range(6)]
    expected = Engine(whole, None, EngineConfig(num_blocks=200)).generate(crowd, GREEDY)
    engine = parallel(workers, path, block_size=4, num_blocks=24, max_batch_tokens=13)
    for _ in range(2):  # the second time the prompts may be in the cache already
        assert [g[0].token_ids for g in engine.generate(crowd, GREEDY)] == [g[0].token_ids for g in expected]
    assert engine.stats().preemptions > 0
    assert engine.stats().prefix_hits > 0
    assert engine.stats().blocks_used == 0

    many = replace(GREEDY, temperature=1.0, seed=3, n=4, max_tokens=9)
    alone = Engine(whole, None).generate([PROMPTS[1]], many)
    again = Engine(engine.model, None, EngineConfig(tensor_parallel=2), workers=workers)
    assert [c.token_ids for c in again.generate([PROMPTS[1]], many)[0]] == [c.token_ids for c in alone[0]]
    pairs = [(PROMPTS[1], [3, 4, 5]), (PROMPTS[1], [6]), (PROMPTS[0], [1])]
    for ours, theirs in zip(again.loglikelihood(pairs), Engine(whole, None).loglikelihood(pairs), strict=True):
        assert ours.sum == pytest.approx(theirs.sum, abs=1e-5)
    assert [g[0].token_ids for g in engine.generate(crowd, GREEDY)] == [g[0].token_ids for g in expected]


def test_every_rank_rounds_its_weights_when_asked(workers: Workers, tmp_path: Path) -> None:
    """A rank's scales are those of its own slice, so the sums differ from one process's by less than a rounding."""
    whole = make("llama", intermediate_size=128)
    engine = parallel(workers, saved(tmp_path / "model", whole))
    plain = Engine(whole, None).loglikelihood([(PROMPTS[1], PROMPTS[3][:9])])[0]
    ranks = workers.runner(
        engine.model, workers.shape, num_blocks=40, block_size=engine.config.block_size, quantize="int8"
    )
    engine._runner = engine._outputs._runner = ranks
    rounded = engine.loglikelihood([(PROMPTS[1], PROMPTS[3][:9])])[0]
    assert rounded.sum != plain.sum
    assert rounded.tokens == pytest.approx(plain.tokens, abs=0.05)


def test_interrupt_waits_for_the_end_of_a_step_and_leaves_a_working_engine(workers: Workers, tmp_path: Path) -> None:
    whole = make("llama", intermediate_size=128)
    engine = parallel(workers, saved(tmp_path / "model", whole))
    run = engine._runner._runner.run  # type: ignore[attr-defined]
    steps = []

    def interrupted(batch: object) -> torch.Tensor:
        steps.append(batch)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return run(batch)  # its sums need every rank

    engine._runner._runner.run = interrupted  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS, GREEDY)
    assert len(steps) == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    expected = Engine(whole, None).generate(PROMPTS, GREEDY)
    assert [g[0].token_ids for g in engine.generate(PROMPTS, GREEDY)] == [g[0].token_ids for g in expected]


def test_bad_input_is_refused_before_anything_is_spread(workers: Workers, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="workers are for 2 ranks or more"):
        Workers(1, CPU)
    with pytest.raises(UserError, match=r"the model is spread over 1; .* nanoworks\.load\(path, tensor_parallel=2\)"):
        Engine(make("llama", intermediate_size=128), None, EngineConfig(tensor_parallel=2))
    with pytest.raises(UserError, match=r"the model is spread over 2"):
        path = saved(tmp_path / "model", make("llama", intermediate_size=128))
        Engine(workers.load(path, dtype=None).model, None, EngineConfig(), workers=workers)


def test_a_worker_that_cannot_start_is_an_error_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no torch here >&2\nexit 3\n")
    broken.chmod(0o755)
    path = saved(tmp_path / "model", make("llama"))
    monkeypatch.setattr(sys, "executable", str(broken))
    with (
        Workers(2, CPU) as workers,
        pytest.raises(WorkerError, match=r"(?s)rank 1 of 2 ended with status 3.*no torch here"),
    ):
        workers.load(path, dtype=None)
    assert workers.failed


def test_a_worker_that_dies_is_an_error_with_its_last_words_and_never_a_hang(workers: Workers, tmp_path: Path) -> None:
    engine = parallel(workers, saved(tmp_path / "model", make("llama", intermediate_size=128)))
    engine.generate([[1]], GREEDY)
    log = workers._directory / "rank1.log"
    log.write_text("out of memory, say")
    workers._processes[0].kill()
    with pytest.raises(
        WorkerError, match=r"(?s)rank 1 of 2 ended by signal 9; load the model again.*out of memory, say"
    ):
        engine.generate(PROMPTS, GREEDY)
    assert not engine.has_work or engine.step()  # the requests ended
    with pytest.raises(WorkerError, match="rank 1 of 2 ended by signal 9"):  # and stays an error, without a wait
        engine.generate(PROMPTS, GREEDY)
    assert not log.parent.exists()


SCRIPT = """
import sys
from nanoworks import LLM, SamplingParams
# No __main__ guard: none is needed.
llm = LLM(sys.argv[1], tensor_parallel=2, device="cpu")
params = SamplingParams(max_tokens=50, temperature=0, ignore_eos=True)
print("workers", *(p.pid for p in llm.model.workers._processes), flush=True)
try:
    while True:
        llm.generate([[1, 2, 3]], params)
except KeyboardInterrupt:
    first = llm.generate([[1, 2, 3]], params)[0].completions[0].token_ids
    print("again", len(first), flush=True)
input()
"""


def test_a_terminals_interrupt_spares_the_workers_and_kill_9_of_rank_0_ends_them(tmp_path: Path) -> None:
    path = saved(tmp_path / "model", make("llama", intermediate_size=128))
    (tmp_path / "script.py").write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, "script.py", str(path)],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        pid = int(process.stdout.readline().split()[1])
        time.sleep(0.3)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole group
        assert process.stdout.readline() == "again 50\n"
        os.kill(pid, 0)
        process.kill()
        for _ in range(100):
            if not alive(pid):
                break
            time.sleep(0.1)
        assert not alive(pid), "the worker outlived rank 0"
    finally:
        process.kill()
        process.communicate()


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
