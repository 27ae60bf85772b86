"""The console: a progress bar on a terminal, one plain line every few steps where output goes to a file.

    sft ━╸━━━━━━━━ 120/1000 eta 3m 12s loss 1.234 lr 0.0002 12.3K tok/s mfu 41.2% 1.9 GiB

Figures of every step live in the bar; occasional ones (`val/...`, `eval/...`) are printed above it and stay
in the scrollback.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from nanoworks.common import human
from nanoworks.config.base import Frozen
from nanoworks.trackers.base import TRACKERS, TrackedRun

OCCASIONAL = ("val/", "eval/")
# In order of worth: a narrow terminal cuts the end.
STATUS: dict[str, Callable[[float], str]] = {
    "train/loss": lambda value: f"loss {value:.3f}",
    "rl/reward": lambda value: f"reward {value:.3f}",
    "train/lr": lambda value: f"lr {value:.2g}",
    "train/tokens_per_second": lambda value: f"{human.count(value)} tok/s",
    "train/mfu": lambda value: f"mfu {human.percent(value)}",
    "train/memory_gib": lambda value: f"{value:.1f} GiB",
}


@TRACKERS.register("console")
class ConsoleTracker:
    class Options(Frozen):
        every: int = Field(default=10, gt=0, description="steps between lines where there is no terminal")

    def __init__(self, options: Options, run: TrackedRun, console: Console | None = None) -> None:
        self._every = options.every
        self._run = run
        self._console = console or PipeSafeConsole(highlight=False)
        self._pace = Pace(run.start_step, run.total_steps)
        self._figures: dict[str, float] = {}
        self._progress: Progress | None = None
        self._printed_step: int | None = None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        occasional = {name: value for name, value in metrics.items() if name.startswith(OCCASIONAL)}
        current = {name: value for name, value in metrics.items() if name not in occasional}
        if current:
            self._pace.add(step)
            self._figures.update(current)
            if self._console.is_terminal:
                self._draw(step)
            elif self._is_due(step):
                self._printed_step = step
                self._print(f"{self._position(step)} {self._status()}")
        if occasional:
            figures = " ".join(f"{name} {value:.4g}" for name, value in occasional.items())
            self._print(f"{self._position(step)} {figures}")

    def artifact(self, path: Path) -> None:
        self._print(f"{self._run.stage} wrote {path}")

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()

    def _is_due(self, step: int) -> bool:
        """Say whether a line is due: the first one, one for each multiple of `every` passed, the last."""
        if self._printed_step is None or step == self._run.total_steps:
            return True
        return step // self._every > self._printed_step // self._every

    def _draw(self, step: int) -> None:
        if self._progress is None:
            whole = Column(no_wrap=True)
            self._progress = Progress(
                TextColumn("[bold]{task.description}", table_column=whole),
                BarColumn(bar_width=10, table_column=whole),
                TextColumn("{task.completed:.0f}/{task.total:.0f}", table_column=whole),
                StatusColumn(),
                console=self._console,
            )
            self._progress.add_task(self._run.stage, total=self._run.total_steps, status="")
            self._progress.start()
        self._progress.update(self._progress.task_ids[0], completed=step, status=self._status())

    def _status(self) -> str:
        remaining = self._pace.remaining_seconds()
        eta = [] if remaining is None else [f"eta {human.duration(remaining)}"]
        known = [(show, self._figures[name]) for name, show in STATUS.items() if name in self._figures]
        return " ".join(eta + [show(value) for show, value in known])

    def _position(self, step: int) -> str:
        width = len(str(self._run.total_steps))
        return f"{self._run.stage} {step:>{width}}/{self._run.total_steps}"

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)


class StatusColumn(ProgressColumn):
    """The figures on one line, the only column that a narrow terminal shortens."""

    def render(self, task: Task) -> Text:
        # The text refuses to wrap, not its column: rich takes width first from columns that may wrap.
        return Text(task.fields["status"], no_wrap=True, overflow="ellipsis")


class Pace:
    """Time left, from the wall clock over the last calls, so that saves and evaluations count too."""

    WINDOW = 50  # calls

    def __init__(self, start_step: int, total_steps: int) -> None:
        self._total = total_steps
        self._marks = deque([(start_step, time.monotonic())], maxlen=self.WINDOW)

    def add(self, step: int) -> None:
        self._marks.append((step, time.monotonic()))

    def remaining_seconds(self) -> float | None:
        """Return seconds to the last step; None at the end and before the first step."""
        (first, began), (last, now) = self._marks[0], self._marks[-1]
        if last <= first or last >= self._total:
            return None
        return (self._total - last) * (now - began) / (last - first)


class PipeSafeConsole(Console):
    """A console that outlives the reader of its pipe (`nanoworks train ... | head`).

    rich would end the process there. Training goes on instead; standard output is pointed at nothing, or
    every later print and the flush at exit would raise as well.
    """

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise BrokenPipeError("nobody reads the output any more")
