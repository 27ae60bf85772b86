"""What the probes say of engines that are idle, busy, broken or stopped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch

from nanoworks.engine import AsyncEngine, Delta, Engine, QueueFull
from nanoworks.serve import canary
from nanoworks.serve.canary import Canary


def test_an_engine_that_computes_is_ready_and_probes_are_cheap(serve: Any, random_engine: Engine) -> None:
    before = random_engine.stats()
    with serve(random_engine) as url, ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: httpx.get(f"{url}/ready"), range(40)))
        assert {answer.status_code for answer in answers} == {200}
        assert random_engine.stats().requests_finished - before.requests_finished < 10
        assert httpx.get(f"{url}/live").json() == httpx.get(f"{url}/health").json() == {"status": "ok"}
        assert "nanoworks:generation_tokens_total{" in (metrics := httpx.get(f"{url}/metrics").text)
        assert 'nanoworks:generation_tokens_total{model_name="tiny"} 0.0' in metrics  # a probe is nobody's request


def test_weights_that_are_not_finite_are_not_ready(serve: Any, make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(context=128)
    with torch.no_grad():
        engine.model.head.lm_head.weight.fill_(float("nan"))
    with serve(engine) as url:
        response = httpx.get(f"{url}/ready")
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert response.json()["error"]["code"] == "not_ready"
        assert "finite" in response.json()["error"]["message"]
        assert httpx.get(f"{url}/ready").status_code == 503  # a failure is not kept, and comes again
        assert httpx.get(f"{url}/health").status_code == 200


def test_an_engine_that_is_busy_is_ready(serve: Any, endless_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """All places are taken for minutes, and the canary cannot be answered."""
    monkeypatch.setattr(endless_engine._scheduler, "max_num_seqs", 1)
    monkeypatch.setattr(canary, "FRESH_SECONDS", 0.0)
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
    with serve(endless_engine) as url, httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        next(line for line in response.iter_lines() if '"content":"b"' in line)
        assert [httpx.get(f"{url}/ready").status_code for _ in range(5)] == [200] * 5
        assert endless_engine.stats().waiting <= 1  # one canary for all probes


class Stuck:
    """An engine that takes requests and computes nothing."""

    error = None

    def __init__(self, stats: Any) -> None:
        self.stats, self.full = stats, False

    async def submit(self, *_: object, **__: object) -> AsyncGenerator[Delta, None]:
        if self.full:
            raise QueueFull(5, 5)
        await asyncio.sleep(1000)
        yield Delta("r", 0)


@pytest.mark.parametrize("full", [False, True])
def test_an_engine_that_takes_requests_and_computes_nothing(random_engine: Engine, full: bool) -> None:
    async def main() -> list[str]:
        stuck = Stuck(random_engine.stats)
        stuck.full = full
        sick = Canary(stuck, patience=1.5 if full else 0.2)  # type: ignore[arg-type]
        return await asyncio.gather(sick.failure(), sick.failure())

    reasons = asyncio.run(main())
    expected = "queue is full" if full else "computed nothing for 0.2 s"
    assert all(expected in reason for reason in reasons)


def test_a_good_sign_is_forgotten_when_the_engine_fails(make_engine: Callable[..., Engine]) -> None:
    engine = AsyncEngine(make_engine(context=128))
    probe = Canary(engine, patience=30)

    async def main() -> None:
        assert await probe.failure() == ""
        engine.error = RuntimeError("it burns")
        assert await probe.failure() == "it burns"

    asyncio.run(main())
    engine.shutdown()
