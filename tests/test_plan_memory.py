"""What `train.memory` predicts against processes that train: minutes, so not among the quick tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


def _benchmark() -> ModuleType:
    file = Path(__file__).resolve().parents[1] / "benchmarks" / "memory.py"
    spec = importlib.util.spec_from_file_location("memory_benchmark", file)
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
