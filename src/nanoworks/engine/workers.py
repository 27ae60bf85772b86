"""Tensor-parallel inference: one process a rank, of which this one is rank 0.

Usage:
    with Workers(2, device) as workers:
        checkpoint = workers.load(path, dtype=None)
        engine = Engine(checkpoint.model, checkpoint.tokenizer, config, workers=workers)

Rank 0 schedules and samples. A step's batch goes through a pipe to each of the others (`engine.worker`), which pass it
through their own share of the model, with their own share of the KV cache; all meet in the sums of `parallel.tensor`.
Workers end when the pipe is closed, so with this process however it ends.
"""

from __future__ import annotations

import os
import pickle
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from nanoworks.checkpoint import Checkpoint, load_checkpoint, locate
from nanoworks.common.errors import UserError
from nanoworks.engine.batch import Batch
from nanoworks.engine.runner import Runner
from nanoworks.models import Decoder
from nanoworks.nn.paged import KVShape
from nanoworks.nn.paged_inputs import PagedInputs
from nanoworks.parallel.group import Group
from nanoworks.parallel.tensor import Shard, join

START_SECONDS = 120
"""How long a worker may take to start."""
_SENT = (*(field.name for field in fields(PagedInputs)), "changes")
"""What of a batch the other ranks need; the rest is about sampling."""


class WorkerError(RuntimeError):
    """A rank failed, and with it the model that was spread over them."""


class Workers:
    """`size - 1` processes beside this one, without a model yet. A context manager.

    On a CPU this process keeps its share of the threads and gives the rest to the others, until `close`.
    """

    shape: KVShape
    """What one token takes in the KV cache of each rank; known once a model is loaded."""

    def __init__(self, size: int, device: torch.device) -> None:
        if size < 2:
            raise UserError(f"tensor_parallel={size}: workers are for 2 ranks or more")
        if device.type == "cuda" and torch.cuda.device_count() < size:
            raise UserError(f"tensor_parallel={size} needs {size} GPUs, {torch.cuda.device_count()} are here")
        if device.type not in ("cpu", "cuda"):
            raise UserError(f"tensor_parallel works on cpu and cuda, not on {device.type}")
        self.size = size
        self.device = rank_device(device, 0)
        self._threads = torch.get_num_threads()
        share = max(1, self._threads // size)
        torch.set_num_threads(share)
        self._directory = Path(tempfile.mkdtemp(prefix="nanoworks-"))
        self._processes = [_start(rank, size, device, share, self._directory) for rank in range(1, size)]
        # Also when the object is forgotten, and when the interpreter ends.
        self._end = weakref.finalize(self, _end, self._processes, self._directory, self._threads)
        self._group: Group | None = None
        self._failure: str | None = None
        self._runners = count()
        self._forgotten: list[int] = []

    def load(self, path: str | Path, *, dtype: torch.dtype | None) -> Checkpoint:
        """Load each rank's share of the checkpoint at `path`, and return rank 0's. Replaces an earlier one.

        Raises:
            UserError: as `load_checkpoint`; no plan for the family; or the number of ranks does not divide the model.
        """
        directory = locate(path).resolve()
        with self.step("load", directory, dtype):
            checkpoint = load_checkpoint(directory, device=self.device, dtype=dtype, cut=Shard(0, self.size).cut)
        model = checkpoint.model
        self.shape = KVShape.of(model, self.device)
        if self._group is None:
            self._meet()
        assert self._group is not None
        with self.step("join"):
            join(model, self._group.all_reduce)
        return checkpoint

    def runner(self, model: Decoder, shape: KVShape, **options: Any) -> ParallelRunner:
        """A `Runner` on each rank, to be used as one; `options` as there."""
        return ParallelRunner(self, next(self._runners), model, shape, options)

    def forget(self, runner: int) -> None:
        """Free a runner on the other ranks before their next step."""
        self._forgotten.append(runner)

    @contextmanager
    def step(self, *message: object) -> Iterator[None]:
        """Let the other ranks do what `message` says while this one does the same within.

        What is raised within leaves the ranks at different places, so it ends the workers.
        """
        if self._failure is None and not self._end.alive:
            raise WorkerError("the model was closed; load it again")
        try:
            while self._forgotten:
                self._send("forget", self._forgotten.pop())
            self._send(*message)
            yield
        except UserError:
            self._kill()
            raise
        except Exception as error:
            raise self._fail(error) from error
        except BaseException:
            self._failure = "a step was interrupted halfway; load the model again"
            self._kill()
            raise

    def close(self) -> None:
        """End the workers, and take their threads back."""
        if self._group is None:
            self._kill()  # some may still be starting
        self._end()

    @property
    def failed(self) -> bool:
        """Whether the ranks are of no use any more."""
        return self._failure is not None or not self._end.alive

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, *message: object) -> None:
        if self._failure is not None:
            raise WorkerError(self._failure)
        data = pickle.dumps(message, protocol=5)
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(data)
            process.stdin.flush()

    def _meet(self) -> None:
        """Wait until every worker runs, then make the group."""
        deadline = time.monotonic() + START_SECONDS
        with self.step("meet"):
            for process in self._processes:
                assert process.stdout is not None
                with selectors.DefaultSelector() as selector:
                    selector.register(process.stdout, selectors.EVENT_READ)
                    if not selector.select(deadline - time.monotonic()):
                        raise TimeoutError(f"a worker did not start within {START_SECONDS} s")
                if not process.stdout.readline():
                    raise EOFError("a worker ended while it started")
            self._group = Group(self._directory / "meeting", 0, self.size, self.device)

    def _fail(self, error: Exception) -> WorkerError:
        """End what is left, and say what happened: here, unless a worker ended by itself."""
        if self._failure is None:
            self._failure = f"tensor parallel step failed: {error}; load the model again"
            deadline = time.monotonic() + 2
            while time.monotonic() < deadline:
                ended = [(rank, p) for rank, p in enumerate(self._processes, start=1) if p.poll() is not None]
                if ended:
                    rank, process = ended[0]
                    status = process.returncode
                    how = f"by signal {-status}" if status < 0 else f"with status {status}"
                    self._failure = f"rank {rank} of {self.size} ended {how}; load the model again"
                    words = _last_words(self._directory, rank)
                    if words:
                        self._failure += f". The last it said:\n{words}"
                    break
                time.sleep(0.02)
            self._kill()
        return WorkerError(self._failure)

    def _kill(self) -> None:
        """End workers that may wait for this rank."""
        for process in self._processes:
            process.kill()
        self._end()


class ParallelRunner:
    """A `Runner` whose batches go through all ranks."""

    def __init__(self, workers: Workers, number: int, model: Decoder, shape: KVShape, options: dict[str, Any]) -> None:
        self._workers, self._number = workers, number
        with workers.step("runner", number, shape, options):
            self._runner = Runner(model, shape, **options)
        weakref.finalize(self, workers.forget, number).atexit = False

    def run(self, batch: Batch) -> Tensor:
        """As `Runner.run`; the same hidden states come out on every rank."""
        with _interrupts_held(), self._workers.step("run", self._number, pack(batch)):
            return self._runner.run(batch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)  # what is no step is rank 0's business: logits, device, ...


def pack(batch: Batch) -> dict[str, Any]:
    """What another rank needs of a batch, in a form that is quickly pickled."""
    values = {name: getattr(batch, name) for name in _SENT}
    return {name: value.cpu().numpy() if isinstance(value, Tensor) else value for name, value in values.items()}


def rank_device(device: torch.device, rank: int) -> torch.device:
    """Where a rank computes: GPUs are taken in order."""
    return torch.device("cuda", rank) if device.type == "cuda" else device


def _start(rank: int, size: int, device: torch.device, threads: int, directory: Path) -> subprocess.Popen[bytes]:
    """Start a worker in a session of its own, so that a terminal's Ctrl-C does not reach it.

    A fresh interpreter, not a child of multiprocessing: a script that makes a model needs no `__main__` guard.
    """
    paths = [path or os.getcwd() for path in sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads)}
    with (directory / f"rank{rank}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", "from nanoworks.engine.worker import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=directory,  # empty, as -c looks for modules here first
            env=environment,
            start_new_session=True,
        )
    assert process.stdin is not None
    job = {"rank": rank, "size": size, "device": rank_device(device, rank), "threads": threads, "directory": directory}
    with suppress(OSError):  # one that ended already is noticed by the first step
        pickle.dump(job, process.stdin)
        process.stdin.flush()
    return process


def _end(processes: list[subprocess.Popen[bytes]], directory: Path, threads: int) -> None:
    for process in processes:
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with suppress(OSError):  # what was not flushed is for nobody any more
                pipe.close()
    deadline = time.monotonic() + 5
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    shutil.rmtree(directory, ignore_errors=True)
    torch.set_num_threads(threads)


def _last_words(directory: Path, rank: int) -> str:
    try:
        return (directory / f"rank{rank}.log").read_text(errors="replace").strip()[-2000:]
    except OSError:
        return ""


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Let a Ctrl-C wait for the end of a step, which ranks that wait for each other must not leave halfway; a second
    one gets through."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    held: list[FrameType | None] = []

    def hold(number: int, frame: FrameType | None) -> None:
        held.append(frame)
        if len(held) > 1:
            before(number, frame)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if len(held) == 1:
        before(signal.SIGINT, held[0])
