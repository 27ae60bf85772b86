"""Which rank holds the others up: each rank's own seconds of a step, with the waiting for others left out.

Ranks work in step, so all of them take as long as the slowest one; what tells them apart is the time between two
communications. It is measured where no rank waits: in reading data and in the forward passes of the layers (FSDP2
gathers before a layer and DDP after all of them; tensor, expert and context ranks talk inside a layer, so among these a
slow one shows in all of its neighbours).
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

log = logging.getLogger("nanoworks")

SLOW = 1.5
"""Times the median of the other ranks: from here on the log names a rank."""


class LayerClock:
    """Counts the forward passes of `layers` and, while `running`, adds up their seconds.

    On a GPU the seconds are its own, between two events; the host, which runs ahead, is not waited for.
    """

    def __init__(self, layers: Sequence[nn.Module], device: torch.device) -> None:
        self.passes = 0
        self.running = False
        self._cuda = device.type == "cuda"
        self._begun: Any = None
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []
        self._hooks = []
        for layer in layers:
            compiled = getattr(layer, "_compiled_call_impl", None) is not None
            hooks: list[Any] = [self._begin, self._end]
            begin, end = map(torch.compiler.disable, hooks) if compiled else hooks
            # FSDP2 puts its own hook, which waits for others, before all that are there
            self._hooks += [layer.register_forward_pre_hook(begin), layer.register_forward_hook(end)]

    def take(self) -> float:
        """Seconds since the last call. On a GPU the layers must have ended: call it when the step's loss is known."""
        total = self._seconds + sum(begun.elapsed_time(ended) for begun, ended in self._events) / 1e3
        self._seconds, self._events = 0.0, []
        return total

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _begin(self, layer: nn.Module, args: Any) -> None:
        self.passes += 1
        if self.running:
            self._begun = self._now()

    def _end(self, layer: nn.Module, args: Any, result: Any) -> None:
        begun, self._begun = self._begun, None
        if not self.running or begun is None:
            return
        if self._cuda:
            self._events.append((begun, self._now()))
        else:
            self._seconds += self._now() - begun

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Stragglers:
    """Compares the ranks every `window` steps. Ranks of different `stage`s (of a pipeline) have different work, so a
    rank is compared with those of its own."""

    def __init__(self, stage: int, host: str, *, window: int = 10) -> None:
        self.stage, self.host, self.window = stage, host, window
        self._steps, self._computing, self._reading = 0, 0.0, 0.0
        self._named: dict[str, int] = {}

    def add(self, computing: float, reading: float) -> bool:
        """Note a step of this rank; True when it is time to `compare`, at the same step on every rank."""
        self._steps += 1
        self._computing += computing
        self._reading += reading
        return self._steps == self.window

    def compare(self, gather: Callable[[Any], list[Any]]) -> dict[str, float]:
        """Metrics over the last steps: of the layers' forward passes and of reading data the median rank's seconds a
        step, the slowest rank's, and its number. Every rank must call this."""
        computing, reading = self._computing / self._steps, self._reading / self._steps
        found = gather([self.stage, self.host, computing, reading])
        self._steps, self._computing, self._reading = 0, 0.0, 0.0
        metrics: dict[str, float] = {}
        worth = max(0.01, 0.1 * statistics.median(row[2] for row in found))  # fewer seconds are not worth a word
        for index, name, what in ((2, "compute", "in the layers' forward passes"), (3, "data", "reading data")):
            seconds = [row[index] for row in found]
            slowest = max(range(len(found)), key=lambda rank: _ratio(rank, found, index))
            metrics[f"ranks/{name}_seconds"] = statistics.median(seconds)
            metrics[f"ranks/{name}_seconds_slowest"] = seconds[slowest]
            metrics[f"ranks/{name}_slowest"] = slowest
            ratio = _ratio(slowest, found, index)
            if ratio < SLOW or seconds[slowest] < worth:
                self._named.pop(what, None)
            elif self._named.get(what) != slowest:  # once, until another rank is slow
                self._named[what] = slowest
                log.warning(
                    f"rank {slowest} on {found[slowest][1]} holds the others up: {seconds[slowest]:.3f} s a step "
                    f"{what}, {ratio:.1f} times the median of the other ranks (over {self.window} steps)"
                )
        return metrics


def _ratio(rank: int, found: list[Any], index: int) -> float:
    """The rank's seconds in times of the median of its stage's other ranks."""
    others = [row[index] for i, row in enumerate(found) if i != rank and row[0] == found[rank][0]]
    return found[rank][index] / max(statistics.median(others), 1e-9) if others else 1.0
