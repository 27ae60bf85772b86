"""A rank of a tensor-parallel model other than rank 0: a process that `engine.workers` starts.

It reads orders from standard input until that is closed: `load`, `meet`, `join`, `runner`, `run`, `forget`, each done
in step with rank 0. What goes wrong ends the process, with a traceback in its log, and that is how rank 0 learns of it.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanoworks.checkpoint import load_checkpoint
from nanoworks.engine.batch import Batch
from nanoworks.engine.runner import Runner
from nanoworks.models import Decoder
from nanoworks.nn.paged import KVShape
from nanoworks.parallel.group import Group
from nanoworks.parallel.tensor import Shard, join


class Worker:
    """The orders, by their names."""

    model: Decoder
    group: Group

    def __init__(self, rank: int, size: int, device: torch.device, directory: Path) -> None:
        self.rank, self.size, self.device, self.directory = rank, size, device, directory
        self.runners: dict[int, Runner] = {}
        if device.type == "cuda":
            torch.cuda.set_device(device)

    def load(self, path: Path, dtype: torch.dtype | None) -> None:
        self.runners.clear()
        cut = Shard(self.rank, self.size).cut
        self.model = load_checkpoint(path, device=self.device, dtype=dtype, cut=cut).model

    def meet(self) -> None:
        self.group = Group(self.directory / "meeting", self.rank, self.size, self.device)

    def join(self) -> None:
        join(self.model, self.group.all_reduce)

    def runner(self, number: int, shape: KVShape, options: dict[str, Any]) -> None:
        self.runners[number] = Runner(self.model, shape, **options)

    def run(self, number: int, packed: dict[str, Any]) -> None:
        self.runners[number].run(self._unpack(packed))

    def forget(self, number: int) -> None:
        self.runners.pop(number, None)

    def _unpack(self, packed: dict[str, Any]) -> Batch:
        """The batch of `workers.pack`."""
        arrays = {name: value for name, value in packed.items() if isinstance(value, np.ndarray)}
        return Batch(**{**packed, **{name: torch.from_numpy(a).to(self.device) for name, a in arrays.items()}})


def main() -> None:
    orders = sys.stdin.buffer
    job = pickle.load(orders)
    parent, directory = os.getppid(), job["directory"]
    threading.Thread(target=_leave_with, args=(parent, directory), daemon=True).start()
    torch.set_num_threads(job.pop("threads"))
    print("ready", flush=True)
    os.dup2(2, 1)  # nobody reads what else is printed
    worker = Worker(**job)
    with torch.no_grad(), contextlib.suppress(EOFError):  # the end of the orders
        while True:
            name, *arguments = pickle.load(orders)
            getattr(worker, name)(*arguments)
    shutil.rmtree(directory, ignore_errors=True)
    os._exit(0)  # at once, instead of a second later


def _leave_with(parent: int, directory: Path) -> None:
    """End this process, even one that waits for another rank, when `parent` is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    time.sleep(2)  # closed pipes end most of them before
    shutil.rmtree(directory, ignore_errors=True)
    os._exit(1)
