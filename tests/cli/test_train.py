"""`nanoworks train` and `nanoworks config` as a person meets them: exit codes and what they say."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from nanoworks.config import to_yaml
from tests.train.tiny import recipe

COMMAND = [sys.executable, "-m", "nanoworks"]


def test_a_wrong_key_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(to_yaml(recipe(tmp_path)))
    for verb in ("config", "train"):
        done = subprocess.run([*COMMAND, verb, str(file), "optim.lr_matrx=1"], capture_output=True, text=True)
        assert done.returncode == 2
        assert "optim.lr_matrx: unknown key (did you mean 'lr_matrix'?)" in done.stderr
        assert "Traceback" not in done.stderr


def test_sigterm_exits_0_with_the_command_that_resumes(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(to_yaml(recipe(tmp_path, train={"length": "1000000 steps"})))
    process = subprocess.Popen(
        [*COMMAND, "train", str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "runs" / "pretrain" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.stat().st_size > 500) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert f"resume with: nanoworks train {tmp_path}/runs/pretrain/config.yaml --resume" in out
