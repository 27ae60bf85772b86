"""What is predicted of memory against processes that train: minutes, so not among the quick tests."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

MEMORY = Path(__file__).resolve().parents[1] / "benchmarks" / "memory.py"


def _benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("memory_benchmark", MEMORY)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("shape", range(4))
def test_memory_of_a_run_is_what_was_predicted(shape: int) -> None:
    found = _benchmark().run(shape)
    assert found["lasting_estimate"] == pytest.approx(found["lasting"], rel=0.02), found
    assert found["estimate"] == pytest.approx(found["peak"], rel=0.1), found


@pytest.mark.slow
def test_memory_of_two_ranks_of_fsdp_is_what_was_predicted() -> None:
    found = _benchmark().run_ranks(2)
    assert found["lasting_estimate"] == pytest.approx(found["lasting"], rel=0.02), found
    assert found["estimate"] == pytest.approx(found["peak"], rel=0.1), found


@pytest.mark.slow
def test_what_is_refused_does_not_fit_and_what_is_not_does() -> None:
    """A shape that takes what the planner says is run with a limit of 15% less and of 15% more."""
    need = _benchmark().run(4)["estimate"]
    few, enough = (_limited(4, round(need * share)) for share in (0.85, 1.15))
    assert few.returncode != 0
    assert "memory" in few.stderr.lower(), few.stderr[-2000:]
    assert enough.returncode == 0, enough.stderr[-2000:]
    assert json.loads(enough.stdout)["estimate"] == need


def _limited(shape: int, limit: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(MEMORY), "--shape", str(shape), "--limit", str(limit)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)
