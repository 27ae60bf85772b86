"""Thousands of requests of which many are left by their clients at any moment: nothing is lost, nothing is kept."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path

import psutil
import pytest

from nanoworks.checkpoint import save_checkpoint
from nanoworks.engine import Engine
from tests.serve.served import Served, serving, until

AT_ONCE = 64


@pytest.fixture(scope="module")
def checkpoint(endless_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("aborted") / "tiny"
    with save_checkpoint(path, endless_engine.model, endless_engine.tokenizer, metadata={}):
        pass
    return path


async def ask(port: int, number: int, *, leave_after: int | None) -> str:
    """Return "left", or the finish reason that came. Args: `leave_after`, bytes of the answer."""
    chance = random.Random(number)
    body = {
        "messages": [{"role": "user", "content": f"{number} " + "x" * chance.randrange(40)}],
        "max_tokens": 200 if leave_after is not None else chance.randrange(1, 12),
        "n": chance.choice([1, 1, 1, 2]),
        "stream": leave_after is not None or chance.random() < 0.5,
    }
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(content)}\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
        if leave_after is not None:
            if leave_after:
                await reader.readexactly(leave_after)
            writer.transport.abort()
            return "left"
        answer = (await reader.read()).decode()
    finally:
        writer.close()
    assert answer.startswith("HTTP/1.1 200"), answer
    assert "[DONE]" in answer or not body["stream"], answer
    assert answer.count('"finish_reason":"length"') == body["n"], answer
    return "length"


async def ask_all(port: int, numbers: range) -> dict[str, int]:
    """One in ten leaves: at once, or after up to 2,000 bytes of its answer."""
    chance = random.Random(numbers.start)
    leaving = set(chance.sample(numbers, len(numbers) // 10))
    waiting = iter(numbers)
    outcomes = {"left": 0, "length": 0}

    async def client() -> None:
        for number in waiting:
            leave_after = chance.choice([0, 1, 300, 2000]) if number in leaving else None
            outcomes[await ask(port, number, leave_after=leave_after)] += 1

    await asyncio.gather(*(client() for _ in range(AT_ONCE)))
    return outcomes


@pytest.mark.parametrize("count", [600, pytest.param(10_000, marks=pytest.mark.slow)])
def test_aborted_requests_leave_nothing_behind(checkpoint: Path, count: int) -> None:
    # A small cache: its memory is taken as it is first used, and should all be in the first half.
    with serving(checkpoint, "--access-log", "none", "--kv-memory", "0.02") as served:
        port = int(served.url.rpartition(":")[2])
        processes = [psutil.Process(served.process.pid), served.engine]

        def settle() -> list[float]:
            """MiB of the server and its engine, once nothing is under way."""
            for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
                until(lambda name=name: served.metric(name) == 0)  # type: ignore[misc]
            return [process.memory_info().rss / 2**20 for process in processes]

        part = count // 2
        halves = [range(part), range(part, count)]
        memory = []
        for half in halves:
            assert asyncio.run(ask_all(port, half)) == {"left": part // 10, "length": part - part // 10}
            memory.append(settle())
        growth = [after - before for before, after in zip(*memory, strict=True)]
        assert all(mib < 30 for mib in growth), memory
        assert served.get("/ready").status_code == 200
        assert served.engine.pid == processes[1].pid
        assert count - count // 10 <= ended(served) <= count  # one that left at once may never have been read


def ended(served: Served) -> float:
    """Requests that the HTTP side saw end, however they did."""
    lines = served.get("/metrics").text.splitlines()
    ours = [line for line in lines if line.startswith("nanoworks:http_requests_total") and "chat/completions" in line]
    return sum(float(line.rpartition(" ")[2]) for line in ours)
