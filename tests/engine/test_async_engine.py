from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import aclosing

import pytest

from nanoworks.common.errors import UserError
from nanoworks.engine import AsyncEngine, Delta, Engine, EngineConfig, Request, SamplingParams
from nanoworks.models import Decoder
from nanoworks.tokenizer import Tokenizer

PARAMS = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=4000, temperature=0, ignore_eos=True)


@pytest.fixture
def engine(new_model: Callable[..., Decoder], tokenizer: Tokenizer) -> Iterator[AsyncEngine]:
    served = AsyncEngine(Engine(new_model(context=4096), tokenizer, EngineConfig(kv_memory=0.01)))
    yield served
    served.shutdown()
    assert not any(t.name == "nanoworks-engine" for t in threading.enumerate())


async def read(engine: AsyncEngine, prompt: list[int], params: SamplingParams) -> tuple[list[list[int]], list[str]]:
    """Token ids and finish reason of each sample."""
    ids: list[list[int]] = [[] for _ in range(params.n)]
    reasons = [""] * params.n
    async for delta in engine.submit(Request(prompt, params)):
        ids[delta.index] += delta.token_ids
        reasons[delta.index] = delta.finish_reason or ""
    return ids, reasons


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_many_coroutines_get_what_they_would_get_alone(engine: AsyncEngine, tokenizer: Tokenizer) -> None:
    prompts = [[i, i + 1] for i in range(20)]
    expected = [[c.token_ids for c in g] for g in Engine(engine.engine.model, tokenizer).generate(prompts, PARAMS)]

    async def main() -> list[tuple[list[list[int]], list[str]]]:
        return await asyncio.gather(*(read(engine, prompt, PARAMS) for prompt in prompts))

    assert asyncio.run(main()) == [(ids, ["length"]) for ids in expected]
    assert asyncio.run(main()) == [(ids, ["length"]) for ids in expected]  # from another event loop
    assert engine.stats().requests_finished == 40


def test_several_samples_come_in_one_stream(engine: AsyncEngine) -> None:
    params = SamplingParams(max_tokens=5, seed=0, n=3, ignore_eos=True)
    ids, reasons = asyncio.run(read(engine, [1, 2], params))
    assert [len(sample) for sample in ids] == [5, 5, 5]
    assert reasons == ["length"] * 3


def test_closing_the_iterator_cancels_the_request(engine: AsyncEngine) -> None:
    async def main() -> None:
        async with aclosing(engine.submit(Request([1], ENDLESS))) as deltas:
            async for _ in deltas:
                break
        await until(lambda: engine.stats().running == engine.stats().blocks_used == 0)

    asyncio.run(main())
    assert engine.stats().tokens_generated < 4000


def test_a_cancelled_task_cancels_its_request(engine: AsyncEngine) -> None:
    async def main() -> None:
        task = asyncio.create_task(read(engine, [1], ENDLESS))
        await until(lambda: engine.stats().running == 1)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        await until(lambda: engine.stats().running == engine.stats().blocks_used == 0)

    asyncio.run(main())


def test_an_impossible_request_is_refused_at_once(engine: AsyncEngine) -> None:
    with pytest.raises(UserError, match="5000 tokens"):
        engine.submit(Request([1] * 5000, PARAMS))


def test_a_failing_model_reaches_every_reader_and_later_ones(engine: AsyncEngine) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("out of luck")

    async def main() -> None:
        tasks = [asyncio.create_task(read(engine, [i], ENDLESS)) for i in range(3)]
        await until(lambda: engine.stats().running == 3)
        engine.engine._runner.model.forward = fail  # type: ignore[method-assign,assignment]
        for task in tasks:
            with pytest.raises(RuntimeError, match="engine failed") as error:
                await task
            assert isinstance(error.value.__cause__, ZeroDivisionError)
        with pytest.raises(RuntimeError, match="engine has stopped"):
            await read(engine, [1], PARAMS)

    asyncio.run(main())
    assert isinstance(engine.error, ZeroDivisionError)


def test_shutdown_ends_what_is_running(engine: AsyncEngine) -> None:
    async def main() -> list[str]:
        task = asyncio.create_task(read(engine, [1], ENDLESS))
        await until(lambda: engine.stats().running == 1)
        await asyncio.to_thread(engine.shutdown)
        return (await task)[1]

    assert asyncio.run(main()) == ["cancelled"]
    assert engine.stats().blocks_used == 0


def test_shutdown_also_ends_what_has_just_come_in(engine: AsyncEngine) -> None:
    gate, at_gate, step = threading.Event(), threading.Event(), engine.engine.step
    gate.set()

    def step_through_gate() -> list[Delta]:
        if not gate.is_set():
            at_gate.set()
            gate.wait(timeout=30)
        return step()

    engine.engine.step = step_through_gate  # type: ignore[method-assign]

    async def main() -> list[str]:
        first = asyncio.create_task(read(engine, [1], ENDLESS))
        await until(lambda: engine.stats().running == 1)
        gate.clear()
        await until(at_gate.is_set)
        second = asyncio.create_task(read(engine, [2], ENDLESS))
        await until(lambda: len(engine._incoming) == 1)
        closing = asyncio.create_task(asyncio.to_thread(engine.shutdown))
        await until(lambda: engine._closing)
        gate.set()
        await closing
        return [(await task)[1][0] for task in (first, second)]

    assert asyncio.run(main()) == ["cancelled", "cancelled"]


def test_an_event_loop_that_dies_does_not_stop_the_engine(engine: AsyncEngine) -> None:
    async def begin() -> None:
        deltas = engine.submit(Request([1], ENDLESS))
        await anext(deltas)
        leaked.append(deltas)

    leaked: list[object] = []
    loop = asyncio.new_event_loop()
    loop.run_until_complete(begin())
    loop.close()
    assert asyncio.run(read(engine, [2], PARAMS))[1] == ["length"]
