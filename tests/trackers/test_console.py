from __future__ import annotations

import io
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from nanoworks.trackers import TrackedRun
from nanoworks.trackers.console import ConsoleTracker, Pace

STEP = {
    "train/loss": 1.2345,
    "train/lr": 0.0002,
    "train/tokens_per_second": 12_345.0,
    "train/mfu": 0.412,
    "train/memory_gib": 1.94,
    "train/grad_norm": 0.7,
}


def _run(run: TrackedRun, *, terminal: bool, width: int = 120) -> tuple[ConsoleTracker, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width, highlight=False, color_system=None)
    return ConsoleTracker(ConsoleTracker.Options(every=10), run, console), out


def _lines(out: io.StringIO) -> list[str]:
    """Return what a terminal was told to show, without the control sequences and empty lines."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    return [line for line in re.split(r"[\r\n]", plain) if line.strip()]


def test_piped_output_is_one_line_every_n_steps(run: TrackedRun) -> None:
    tracker, out = _run(run, terminal=False, width=40)
    for step in range(1, 101):
        tracker.log(STEP, step)
    tracker.close()
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/100", *(f"{n}/100" for n in range(10, 101, 10))]
    assert lines[-1] == "sft 100/100 loss 1.234 lr 0.0002 12.3K tok/s mfu 41.2% 1.9 GiB"
    assert out.getvalue().isascii()


def test_a_resumed_or_sparse_log_still_prints(run: TrackedRun) -> None:
    tracker, out = _run(replace(run, start_step=60), terminal=False)
    for step in range(63, 101, 7):
        tracker.log(STEP, step)
    assert [line.split()[1] for line in out.getvalue().splitlines()] == [
        "63/100",
        "70/100",
        "84/100",
        "91/100",
    ]


def test_occasional_figures_are_printed_at_once(run: TrackedRun) -> None:
    tracker, out = _run(run, terminal=False)
    tracker.log({"val/bpb": 1.23456, "eval/[b]arc": 0.5}, 7)
    tracker.artifact(Path("runs/demo/step-000007"))
    assert out.getvalue().splitlines() == [
        "sft   7/100 val/bpb 1.235 eval/[b]arc 0.5",
        "sft wrote runs/demo/step-000007",
    ]


def test_a_terminal_gets_a_bar_and_keeps_the_occasional_figures(run: TrackedRun) -> None:
    tracker, out = _run(run, terminal=True)
    tracker.log(STEP, 40)
    tracker.log({"val/bpb": 1.23456}, 40)
    tracker.log({**STEP, "rl/reward": 0.25}, 41)
    tracker.close()
    lines = _lines(out)
    assert "sft  40/100 val/bpb 1.235" in [line.strip() for line in lines]
    last = lines[-1]
    assert "━" in last
    for part in ("sft", "41/100", "loss 1.234", "reward 0.250", "12.3K tok/s", "mfu 41.2%", "1.9 GiB"):
        assert part in last


@pytest.mark.parametrize("width", [40, 60, 80])
def test_the_bar_stays_on_one_line_of_a_narrow_terminal(width: int, run: TrackedRun) -> None:
    tracker, out = _run(run, terminal=True, width=width)
    tracker.log(STEP, 40)
    tracker.close()
    lines = _lines(out)
    assert all(len(line) <= width for line in lines)
    assert all("/100" in line for line in lines)
    assert "loss" in lines[-1] or width == 40


def test_time_left_follows_the_recent_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    pace = Pace(10, 1000)
    assert pace.remaining_seconds() is None
    for step in range(11, 200):
        now[0] += 5.0 if step < 100 else 2.0
        pace.add(step)
    assert pace.remaining_seconds() == pytest.approx((1000 - 199) * 2.0)
    pace.add(1000)
    assert pace.remaining_seconds() is None


def test_training_outlives_the_reader_of_its_pipe(tmp_path: Path) -> None:
    trainer = f"""
from pathlib import Path
from nanoworks.config.base import Method
from nanoworks.trackers import TrackedRun, open_trackers
trackers = open_trackers([Method(name="console", every=1)], TrackedRun(Path("."), "i", "n", "sft", 3000))
for step in range(1, 3001):
    trackers.log({{"train/loss": 1.0}}, step)
trackers.close()
Path({str(tmp_path / "done")!r}).touch()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", trainer], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("sft    1/3000")
    process.stdout.close()
    assert process.stderr is not None
    warning = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 0
    assert (tmp_path / "done").exists()
    assert warning.count("\n") == 1
    assert "tracker console failed" in warning
