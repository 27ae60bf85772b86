"""`nanoworks serve` as its operators run it: a process, and the engine's process under it."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

BODY = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "temperature": 0}


class Served:
    """`nanoworks serve` in a process, and its engine's."""

    def __init__(self, checkpoint: Path, *options: str) -> None:
        command = [sys.executable, "-m", "nanoworks", "serve", str(checkpoint), "--port", "0", "--device", "cpu"]
        self.process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        found = re.search(r"open (https?://127\.0\.0\.1:\d+)", self.process.stdout.readline())
        assert found, self.process.communicate()[1]
        self.url = found[1]

    @property
    def engine(self) -> psutil.Process:
        (child,) = psutil.Process(self.process.pid).children()
        return child

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30)

    def ask(self, body: Any = BODY) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=60)

    def metric(self, name: str) -> float:
        found = re.search(rf"^nanoworks:{name}\{{.*\}} (\S+)$", self.get("/metrics").text, re.MULTILINE)
        assert found, name
        return float(found[1])


@contextmanager
def serving(checkpoint: Path, *options: str) -> Iterator[Served]:
    """At the end of it the server has to leave cleanly, without a process left behind."""
    served = Served(checkpoint, *options)
    try:
        yield served
        engine = served.engine
        served.process.terminate()
        assert served.process.wait(60) == 0
        assert not engine.is_running()
    finally:
        served.process.kill()
        _, err = served.process.communicate()
    assert "Traceback" not in err, err


def until(condition: Callable[[], bool], *, seconds: float = 60) -> float:
    """Return after how many seconds `condition` held."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds
        time.sleep(0.02)
    return time.monotonic() - start
