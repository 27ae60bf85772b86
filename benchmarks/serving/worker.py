"""One engine in a process of its own, in its own environment: JSON lines in, JSON lines out.

    python worker.py ADAPTER

Requests and answers:
    {"op": "load", "model": DIR, "precision": "bf16", "threads": 2, "cpus": [0, 1]} -> {"seconds", "about"}
    {"op": "generate", "prompts": [[ids]], "counts": [n]}        -> {"seconds", "tokens", "first": [first id of each]}
    anything that fails                                          -> {"error": traceback}

An adapter is a module of `adapters/` with a class `Adapter(model, precision, threads)` that has
`generate(prompts, counts) -> list[list[int]]`: greedy, exactly counts[i] tokens each whatever they are, all requests
given at once. It may say what it runs in `about`. Everything an engine prints goes to standard error.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import time
import traceback
from typing import Any


def load(name: str, message: dict[str, Any]) -> Any:
    os.sched_setaffinity(0, message["cpus"])
    os.environ["OMP_NUM_THREADS"] = str(message["threads"])
    os.environ["HF_HUB_OFFLINE"] = "1"
    adapter = importlib.import_module(f"adapters.{name}").Adapter
    return adapter(message["model"], message["precision"], message["threads"])


def main() -> None:
    # Ends with the process that started it, however that ends, also while it is stopped: prctl(PR_SET_PDEATHSIG).
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    # Engines print to standard output, some from C: the protocol keeps a copy of it for itself.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    engine: Any = None
    for line in sys.stdin:
        message = json.loads(line)
        try:
            started = time.perf_counter()
            if message["op"] == "load":
                engine = load(sys.argv[1], message)
                answer = {"seconds": time.perf_counter() - started, "about": getattr(engine, "about", "")}
            else:
                counts = message["counts"]
                outputs = engine.generate(message["prompts"], counts)
                seconds = time.perf_counter() - started
                made = [len(output) for output in outputs]
                assert made == counts, f"asked for {counts} tokens and got {made}"
                answer = {"seconds": seconds, "tokens": sum(made), "first": [output[0] for output in outputs]}
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
