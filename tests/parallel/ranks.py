"""Gloo ranks for tests: one group of worker processes that runs many cases, so that a case costs a tenth of a second.

    def sums(scale: float) -> float:            # at the top of a test's module: the workers import it by name
        x = torch.tensor(scale * (dist.get_rank() + 1))
        dist.all_reduce(x)
        return float(x)

    assert ranks(2).run(sums, 1.0) == [3.0, 3.0]

Every case gets a fresh process group (gloo, met at a file), one thread a rank, torch seeded with 0, and a hard timeout.
A rank that fails fails the case with its own traceback; the workers are then replaced, so no case hurts the next.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

TIMEOUT = 60.0
"""Seconds for one case. Generous: a machine of two cores may be busy with other things."""


class RankError(Exception):
    """One rank or more failed; the message holds each one's traceback."""


@functools.cache
def ranks(n: int) -> Ranks:
    """`n` ranks. Groups of any size share the same workers."""
    return Ranks(n)


class Ranks:
    def __init__(self, n: int) -> None:
        self.n = n

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
        """Call `function(*args)` on every rank and return what each gave, in order of rank.

        `function` must be at the top of a module; it, `args` and the results travel by pickle.

        Raises:
            RankError: a rank raised, ended, or gave nothing within `timeout` seconds.
        """
        with tempfile.TemporaryDirectory() as folder:
            workers = [_worker(rank) for rank in range(self.n)]
            meet = str(Path(folder) / "meet")
            for rank, worker in enumerate(workers):
                worker.send((function, args, rank, self.n, meet, timeout))
            answers = _collect([worker.pipe for worker in workers], timeout)
        failed = [f"rank {rank}: {answer[1]}" for rank, answer in sorted(answers.items()) if not answer[0]]
        if failed:
            replace_all()
            raise RankError("\n".join(failed))
        return [answers[rank][1] for rank in range(self.n)]


class _Worker:
    def __init__(self) -> None:
        self.pipe, theirs = _processes().Pipe()
        self.process = _processes().Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        assert self.pipe.poll(300), "a worker did not start"  # the first imports torch: no part of a case's time
        self.pipe.recv_bytes()

    def send(self, case: Any) -> None:
        self.pipe.send_bytes(pickle.dumps(case))


_workers: list[_Worker] = []


def _worker(rank: int) -> _Worker:
    while len(_workers) <= rank:
        _workers.append(_Worker())
    return _workers[rank]


def replace_all() -> None:
    """Let the next case have new processes."""
    while _workers:
        worker = _workers.pop()
        worker.process.kill()
        worker.process.join()
        worker.pipe.close()


@functools.cache
def _processes() -> Any:
    context = multiprocessing.get_context("forkserver")
    ours = ["nanoworks.parallel.native", "nanoworks.parallel.pipeline", "nanoworks.models"]
    context.set_forkserver_preload(["torch._dynamo", *ours])
    return context


def _collect(pipes: list[Any], timeout: float) -> dict[int, tuple[bool, Any]]:
    """What each rank answered: (True, result) or (False, the reason)."""
    answers: dict[int, tuple[bool, Any]] = {}
    deadline = time.monotonic() + timeout
    while len(answers) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in answers]
        ready = connection.wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            late = dict.fromkeys(range(len(pipes)), (False, f"no answer in {timeout:.0f} s"))
            return late | answers
        for pipe in ready:
            rank = next(index for index, candidate in enumerate(pipes) if candidate is pipe)
            try:
                answers[rank] = pickle.loads(pipe.recv_bytes())
            except (EOFError, ConnectionError):
                answers[rank] = (False, "the process ended")
            if not answers[rank][0]:  # the others now wait for a rank that will not come: seconds, not minutes
                deadline = min(deadline, time.monotonic() + 5)
    return answers


def _serve(pipe: Any) -> None:
    """A worker's life: take a case, run it in a process group of its own, answer."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    pipe.send_bytes(b"ready")
    while True:
        try:
            case = pipe.recv_bytes()
        except EOFError:
            return
        try:
            answer = (True, _run(*pickle.loads(case)))
        except BaseException:  # a SystemExit or an interrupt is an answer as well
            answer = (False, traceback.format_exc())
        sys.stdout.flush()
        pipe.send_bytes(pickle.dumps(answer))


def _run(function: Callable[..., Any], args: tuple[Any, ...], rank: int, n: int, meet: str, timeout: float) -> Any:
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo", init_method=f"file://{meet}", rank=rank, world_size=n, timeout=timedelta(seconds=timeout)
    )
    try:
        return function(*args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        # DTensor remembers what its operations give, mesh and names of groups included, for any mesh of the same shape.
        _clear_sharding_prop_cache()
