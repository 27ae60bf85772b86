"""A worker of `worker.py` from outside: started, asked, and put to sleep while another engine is measured."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from workload import HOME

ADAPTERS = {"llama.cpp": "llama_cpp"}
"""Adapter of an engine, where it has another name."""

LOAD_SECONDS = 400.0
CALL_SECONDS = 300.0


class WorkerError(Exception):
    """An engine cannot do what it was asked; the text is its own."""


class Worker:
    """Args: `model` is what `toy_models.model_for` gives. Loads at once; WorkerError when that fails."""

    def __init__(
        self, engine: str, precision: str, model: Path, *, python: Path, threads: int, cpus: list[int]
    ) -> None:
        self.log = HOME / "logs" / f"{engine}-{precision}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [str(python), str(Path(__file__).with_name("worker.py")), ADAPTERS.get(engine, engine)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                start_new_session=True,
            )
        self._asleep = False
        message = {"op": "load", "model": str(model), "precision": precision, "threads": threads, "cpus": cpus}
        self.about = self._ask(message, LOAD_SECONDS)["about"]

    def generate(self, prompts: list[list[int]], counts: list[int]) -> tuple[float, list[int]]:
        """Return seconds and the first token of each prompt's output."""
        answer = self._ask({"op": "generate", "prompts": prompts, "counts": counts}, CALL_SECONDS)
        return answer["seconds"], answer["first"]

    def sleep(self) -> None:
        """Stop the process as it is: threads of an idle engine spin, poll, and take from the one that is measured."""
        self._signal(signal.SIGSTOP)
        self._asleep = True

    def close(self) -> None:
        if self._process.poll() is None:
            self._signal(signal.SIGCONT)
            self._signal(signal.SIGKILL)
            self._process.wait()

    def _ask(self, message: dict[str, Any], seconds: float) -> dict[str, Any]:
        if self._asleep:
            self._signal(signal.SIGCONT)
            self._asleep = False
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            with selectors.DefaultSelector() as selector:
                selector.register(self._process.stdout, selectors.EVENT_READ)
                if not selector.select(seconds):
                    raise WorkerError(f"no answer to {message['op']} after {seconds:.0f} s")
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"the process ended with status {self._process.wait()}; see {self.log}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"].strip())
        return answer

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)


def settle(seconds: float = 0.3) -> None:
    """Let the threads of what ran last go to sleep."""
    time.sleep(seconds)
