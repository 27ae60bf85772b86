"""Watches over ranks that work together: finds the one that hangs, and writes down where each of them stands.

When one rank stops, all others soon wait for it in a communication, in C++, where no exception reaches them. So every
rank has a thread that looks whether its training goes on (each layer's forward pass is a sign of life). When nothing
has happened for `parallel.timeout_minutes` it rings an alarm at the store through which the ranks met; then every rank
writes the Python stacks of all its threads into its log and torch's record of its last collectives beside it, they
compare how many collectives each has come to, and the process ends with the error that names the rank. A launcher that
restarts (`torchrun --max-restarts`) goes on from the last complete step.

At any other time `kill -USR2 PID` writes a rank's stacks into its log and disturbs nothing.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nanoworks.parallel import Strategy
from nanoworks.train.stragglers import LayerClock, Stragglers

log = logging.getLogger("nanoworks")

EXIT_CODE = 4
"""Of a process that ends because a rank hangs."""


class Unwatched:
    """For one process: nobody waits for it."""

    def begin(self, step: int, reading: float) -> None:
        """The ranks start to work on `step` together; this one read its data in so many seconds."""

    def end(self) -> dict[str, float]:
        """The step is done: metrics about the ranks, every few steps. Every rank."""
        return {}

    def close(self) -> None: ...


class Watch(Unwatched):
    def __init__(
        self, strategy: Strategy, layers: Sequence[nn.Module], device: torch.device, logs: Path, *, minutes: float
    ) -> None:
        """Watches the thread that calls this. `logs` holds the ranks' logs (`parallel.log_to_file`)."""
        import torch.distributed as dist

        mesh = strategy.mesh
        self.rank, self.world, self.limit = mesh.rank, mesh.world_size, minutes * 60
        self.poll = min(5.0, self.limit / 20)
        self.log, self.record = logs / f"rank-{mesh.rank:03d}.log", logs / f"rank-{mesh.rank:03d}.collectives.json"
        self.clock = LayerClock(layers, device)
        stage = mesh["pipeline"].get_local_rank() if mesh.degrees.pipeline > 1 else 0
        self.stragglers = Stragglers(stage, socket.gethostname())
        self._strategy = strategy
        # A connection of its own: the training thread may wait at the store for minutes.
        store: Any = dist.distributed_c10d._get_default_store()  # the type stubs lack `clone`
        self._store = dist.PrefixStore("watch", store.clone())
        self._trainee = threading.get_ident()
        self._step: int | None = None
        self._reading = 0.0
        self._signs = 0
        self._closed = threading.Event()
        self._file = self.log.open("a", encoding="utf-8")
        faulthandler.register(signal.SIGUSR2, file=self._file, all_threads=True)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def begin(self, step: int, reading: float) -> None:
        self._signs += 1
        self._step, self._reading = step, reading
        self.clock.running = True

    def end(self) -> dict[str, float]:
        self._step = None
        self.clock.running = False
        due = self.stragglers.add(self.clock.take(), self._reading)
        return self.stragglers.compare(self._strategy.gather) if due else {}

    def close(self) -> None:
        self._closed.set()
        self._thread.join(2 * self.poll)  # it may wait at a store whose server is gone
        self.clock.close()
        faulthandler.unregister(signal.SIGUSR2)
        self._file.close()

    def _run(self) -> None:
        """The watching thread."""
        seen, since = -1, time.monotonic()
        while not self._closed.wait(self.poll):
            signs = self._signs + self.clock.passes
            if signs != seen or self._step is None:
                seen, since = signs, time.monotonic()
            try:
                alarm = self._store.check(["alarm"])
                if not alarm and time.monotonic() - since > self.limit:
                    self._store.set("alarm", "")
                    alarm = True
            except RuntimeError:  # the store is gone, and with it the launcher or the first rank
                return
            if alarm:
                try:
                    self._give_up(time.monotonic() - since)
                finally:
                    os._exit(EXIT_CODE)  # the training thread is somewhere in C++ and cannot be told

    def _give_up(self, seconds: float) -> None:
        """Write down where this rank stands, hear where the others do, and say who hangs."""
        standing = {"step": self._step, "host": socket.gethostname(), "pid": os.getpid(), **self._where()}
        self._store.set(f"rank-{self.rank}", json.dumps(standing))
        self._file.write(f"\n{time.strftime('%F %T')} a rank hangs; the stacks of this one (step {self._step}):\n")
        self._file.flush()
        faulthandler.dump_traceback(file=self._file, all_threads=True)
        _write_collectives(self.record)
        time.sleep(4 * self.poll)  # in which every rank that can has seen the alarm and has answered it
        standings: dict[int, dict[str, Any]] = {}
        for rank in range(self.world):
            if self._store.check([f"rank-{rank}"]):
                standings[rank] = json.loads(self._store.get(f"rank-{rank}"))
        message = (
            f"{verdict(standings, self.world)}. Nothing has happened for {max(seconds, self.limit):.0f} s in step "
            f"{self._step or standings[min(standings)]['step']}. The stacks of every rank are in "
            f"{self.log.parent}/rank-*.log, their last collectives in rank-*.collectives.json. Resume with --resume "
            "(torchrun --max-restarts does it by itself); if a step may take that long, raise parallel.timeout_minutes"
        )
        log.error(message)
        if self.rank == min(standings):
            print(f"error: {message}", file=sys.stderr, flush=True)
        self._file.flush()
        time.sleep(self.poll)  # the slowest rank reads the others' standings before the launcher ends it

    def _where(self) -> dict[str, Any]:
        """How many collectives this rank has come to, by process group, and the line of its training thread."""
        from torch.distributed import distributed_c10d

        groups = {}
        known: dict[Any, Any] = dict(distributed_c10d._world.pg_names)
        for group, name in known.items():
            with contextlib.suppress(RuntimeError):
                groups[name] = group._get_sequence_number_for_group()
        frame = sys._current_frames().get(self._trainee)
        stack = traceback.extract_stack(frame)[::-1] if frame is not None else []
        ours = [f for f in stack[1:] if "nanoworks" in Path(f.filename).parts]
        lines = [f"{Path(f.filename).name}:{f.lineno} ({f.name})" for f in [*stack[:1], *ours[:2]]]
        return {"groups": groups, "where": ", from ".join(lines)}


def verdict(standings: dict[int, dict[str, Any]], world: int) -> str:
    """Who hangs, by what each rank that answered said of itself (`groups`: collectives that it has come to in each of
    its process groups).

    A rank that does not answer has stopped altogether. Else it is one for which others wait in a group and that itself
    waits for nobody: it is behind another rank in some group, and ahead in none.
    """
    silent = [rank for rank in range(world) if rank not in standings]
    if silent:
        return f"{_ranks(silent)} hangs: no answer, its process is stopped or its machine is not to be reached"
    behind, ahead = set(), set()
    for rank, own in standings.items():
        for other in standings.values():
            for name, count in own["groups"].items():
                theirs = other["groups"].get(name, count)
                if count < theirs:
                    behind.add(rank)
                elif count > theirs:
                    ahead.add(rank)
    hanging = sorted(behind - ahead or behind)
    if not hanging:
        where = "; ".join(f"rank {rank} at {own['where']}" for rank, own in sorted(standings.items())[:8])
        return f"the ranks hang, all at the same communication: {where}"
    where = "; ".join(f"it is at {standings[r]['where']}, host {standings[r]['host']}" for r in hanging)
    return f"{_ranks(hanging)} hangs: the others wait for it in a communication and {where}"


def _ranks(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + " and ".join(map(str, ranks))


def _write_collectives(file: Path) -> None:
    """torch's flight recorder, where it has one."""
    from torch._C import _distributed_c10d

    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        if dump := getattr(_distributed_c10d, name, None):
            with contextlib.suppress(RuntimeError, OSError):
                file.write_bytes(dump())
                return


def open_watch(
    strategy: Strategy, layers: Sequence[nn.Module], device: torch.device, logs: Path, *, minutes: float
) -> Unwatched:
    """A watch where there are several ranks."""
    if strategy.mesh.world_size == 1:
        return Unwatched()
    return Watch(strategy, layers, device, logs, minutes=minutes)
