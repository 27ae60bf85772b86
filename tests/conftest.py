"""Fixtures for every test: one thread, and the shared data where it lies beside the checkout."""

from __future__ import annotations

import os
import signal
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported

DATA = Path(__file__).parent / "data"


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what is to run in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Small files that are part of the repository."""
    return DATA


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Golden data and real data sets kept beside the checkout; tests that need them skip without."""
    path = Path(__file__).parents[2] / "shared"
    if not path.is_dir():
        pytest.skip("needs ../shared (golden data), which this checkout does not have")
    return path
