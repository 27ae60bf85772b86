"""The benchmark of pretraining on an accelerator, run on whatever is here."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = ["model.num_hidden_layers=2", "model.hidden_size=64", "model.num_attention_heads=2"]


@pytest.mark.slow
def test_prints_speed_memory_and_kernels(tmp_path):
    settings = ["data.sequence_length=64", "model.num_key_value_heads=1", "model.intermediate_size=64", *TINY]
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "gpu.py"),
        "--recipes",
        "pretrain/llama-120m,pretrain/llama-1b",
    ]
    command += [
        "--recipes",
        "pretrain/llama-120m,pretrain/llama-1b",
        "--steps",
        "4",
        "--rows",
        "1",
        "--vocab-size",
        "512",
    ]
    command += [part for setting in settings for part in ("--set", setting)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for recipe in done.stdout.split("\npretrain/llama-")[1:]:
        assert re.search(r"tokens/s +[\d,]+\n", recipe)
        assert re.search(r"memory +[\d.]+ GiB, planned [\d.]+ GiB", recipe)
        shares = [float(share) for share in re.findall(r"^ +([\d.]+)% +[\d.]+ +[\d,]+  \S", recipe, re.MULTILINE)]
        assert len(shares) == 10
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) <= 100.1
