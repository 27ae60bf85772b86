"""The engine in another process, as the server sees it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path

import pytest
import uvloop

from nanoworks.checkpoint import load_checkpoint, save_checkpoint
from nanoworks.common.errors import UserError
from nanoworks.engine import Delta, Engine, EngineConfig, QueueFull, Request, SamplingParams
from nanoworks.engine.client import EngineClient, EngineGone
from nanoworks.engine.grammar import Grammar
from nanoworks.engine.remote import EngineSpec, RemoteEngine
from nanoworks.engine.remote.wire import Frames, delta_of, frame, row_of
from nanoworks.models import Decoder
from nanoworks.tokenizer import Tokenizer

PARAMS = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=100_000, temperature=0, ignore_eos=True)
CONFIG = EngineConfig(kv_memory=0.01, max_queue=50)


@pytest.fixture(scope="module")
def checkpoint(
    new_model: Callable[..., Decoder], tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("remote") / "model"
    with save_checkpoint(path, new_model(context=100_000), tokenizer, metadata={}):
        pass
    return path


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """The one event loop of `engine`, of the kind that serves."""
    loop = uvloop.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def engine(checkpoint: Path, loop: asyncio.AbstractEventLoop) -> Iterator[RemoteEngine]:
    with started(EngineSpec(str(checkpoint), CONFIG, device="cpu"), loop) as engine:
        yield engine


@pytest.fixture
def doomed(checkpoint: Path, loop: asyncio.AbstractEventLoop) -> Iterator[RemoteEngine]:
    """For a test that ends its process."""
    with started(EngineSpec(str(checkpoint), CONFIG, device="cpu", warmup=True), loop) as engine:
        yield engine


@contextmanager
def started(spec: EngineSpec, loop: asyncio.AbstractEventLoop) -> Iterator[RemoteEngine]:
    engine = RemoteEngine(spec)
    try:
        engine.wait()
        yield engine
    finally:
        loop.run_until_complete(asyncio.to_thread(engine.shutdown))
    assert _is_gone(engine.pid)


def _is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


async def read(engine: EngineClient, prompt: list[int], params: SamplingParams, **own: object) -> list[list[Delta]]:
    """The deltas of each sample."""
    deltas: list[list[Delta]] = [[] for _ in range(params.n)]
    async for delta in engine.submit(Request(prompt, params, **own)):  # type: ignore[arg-type]
        deltas[delta.index].append(delta)
    return deltas


def ids(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def run(loop: asyncio.AbstractEventLoop, main: Coroutine[object, object, None]) -> None:
    loop.run_until_complete(asyncio.wait_for(main, 100))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_it_answers_as_an_engine_here_does(
    engine: RemoteEngine, loop: asyncio.AbstractEventLoop, checkpoint: Path
) -> None:
    prompts = [[i, i + 1] for i in range(20)]
    here = Engine(load_checkpoint(checkpoint).model, engine.tokenizer, CONFIG)
    rich = SamplingParams(max_tokens=6, n=3, seed=1, logprobs=2, ignore_eos=True)
    shaped = SamplingParams(max_tokens=30, grammar=Grammar.choice(["one", "two"]))

    async def main() -> None:
        before = engine.stats().requests_finished
        answers = await asyncio.gather(*(read(engine, prompt, PARAMS) for prompt in prompts))
        expected = here.generate(prompts, PARAMS)
        assert [ids(deltas) for (deltas,) in answers] == [c.token_ids for (c,) in expected]
        assert ["".join(d.text for d in deltas) for (deltas,) in answers] == [c.text for (c,) in expected]
        assert all(deltas[0].queue_seconds is not None for (deltas,) in answers)
        assert all(0 <= deltas[0].queue_seconds < 100 for (deltas,) in answers)

        for deltas, completion in zip(await read(engine, [5], rich), here.generate([[5]], rich)[0], strict=True):
            assert ids(deltas) == completion.token_ids
            assert [p for d in deltas for p in d.logprobs] == pytest.approx(completion.logprobs, abs=1e-4)
            tops = [top for d in deltas for top in d.top_logprobs]
            assert [[t for t, _ in top] for top in tops] == [[t for t, _ in top] for top in completion.top_logprobs]
            assert (deltas[-1].finish_reason, deltas[-1].index) == ("length", deltas[0].index)

        ((*_, last),) = await read(engine, [5], shaped)
        assert last.finish_reason == "stop"
        ((embedding,),) = await read(engine, [5, 6], SamplingParams(max_tokens=0), pooling="mean")
        assert len(embedding.embedding) == 32
        stats = engine.stats()
        assert (stats.requests_finished - before, stats.running, stats.blocks_used) == (23, 0, 0)
        assert engine.silent_seconds == 0

    run(loop, main())


def test_what_can_never_run_and_what_is_cancelled(engine: RemoteEngine, loop: asyncio.AbstractEventLoop) -> None:
    async def main() -> None:
        before = engine.stats().requests_finished
        with pytest.raises(UserError, match="outside the model's vocabulary"):
            await read(engine, [100_000], PARAMS)
        with pytest.raises(UserError, match="prompt has"):
            await read(engine, [1] * 200_000, PARAMS)
        async with aclosing(engine.submit(Request([1], ENDLESS))) as deltas:
            async for _ in deltas:
                break
        await until(lambda: engine.stats().requests_finished == before + 1)
        task = asyncio.create_task(read(engine, [1], ENDLESS))
        await until(lambda: engine.stats().running == 1)
        task.cancel()
        await asyncio.wait([task])
        await until(lambda: engine.stats().running == engine.stats().blocks_used == 0)
        assert engine.stats().requests_finished == before + 2

    run(loop, main())


def test_too_many_are_refused(engine: RemoteEngine, loop: asyncio.AbstractEventLoop) -> None:
    async def main() -> None:
        os.kill(engine.pid, signal.SIGSTOP)  # so that it takes none
        tasks = [asyncio.create_task(read(engine, [1], ENDLESS)) for _ in range(CONFIG.max_queue)]
        await until(lambda: refused() == "50 requests wait already and the limit is 50; try again later")
        os.kill(engine.pid, signal.SIGCONT)
        await until(lambda: engine.stats().running == CONFIG.max_queue)
        engine.check_queue()  # they run: nobody waits
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    def refused() -> str:
        try:
            engine.check_queue()
        except QueueFull as error:
            return str(error)
        return ""

    run(loop, main())


def test_a_killed_process_is_an_error_of_every_request(doomed: RemoteEngine, loop: asyncio.AbstractEventLoop) -> None:
    async def main() -> None:
        tasks = [asyncio.create_task(read(doomed, [i], ENDLESS)) for i in range(3)]
        await until(lambda: doomed.stats().running == 3)
        os.kill(doomed.pid, signal.SIGKILL)
        for task in tasks:
            with pytest.raises(EngineGone, match="send it again"):
                await task
        await doomed.gone.wait()
        assert await doomed.ended() == "by signal 9"
        with pytest.raises(EngineGone, match="not running"):
            await read(doomed, [1], PARAMS)
        assert (doomed.stats().running, doomed.stats().blocks_used) == (0, 0)

    run(loop, main())


def test_a_process_that_does_nothing_is_noticed(engine: RemoteEngine, loop: asyncio.AbstractEventLoop) -> None:
    async def main() -> None:
        await read(engine, [1], PARAMS)
        os.kill(engine.pid, signal.SIGSTOP)
        await asyncio.sleep(0.1)
        assert engine.silent_seconds == 0  # nobody waits for it
        task = asyncio.create_task(read(engine, [1], PARAMS))
        await until(lambda: engine.silent_seconds > 0.3)
        os.kill(engine.pid, signal.SIGCONT)
        ((*_, last),) = await task
        assert last.finish_reason == "length"
        assert engine.silent_seconds == 0

    run(loop, main())


def test_one_that_reads_slowly_is_not_taken_for_silence(engine: RemoteEngine, loop: asyncio.AbstractEventLoop) -> None:
    async def main() -> None:
        before = engine.stats().requests_finished
        async with aclosing(engine.submit(Request([1], PARAMS))) as deltas:
            await anext(deltas)
            await until(lambda: engine.stats().requests_finished == before + 1)
            assert engine.silent_seconds == 0
            assert len(ids([delta async for delta in deltas])) == 19

    run(loop, main())


def test_shutdown_ends_what_is_running(doomed: RemoteEngine, loop: asyncio.AbstractEventLoop) -> None:
    async def main() -> None:
        await read(doomed, [1], PARAMS)
        assert doomed.stats().requests_finished > CONFIG.max_num_seqs  # it was warmed up
        task = asyncio.create_task(read(doomed, [1], ENDLESS))
        await until(lambda: doomed.stats().running == 1)
        await asyncio.to_thread(doomed.shutdown)
        ((*_, last),) = await task
        assert last.finish_reason == "cancelled"
        assert await doomed.ended() == "with status 0"
        with pytest.raises(EngineGone, match="has stopped"):
            await read(doomed, [1], PARAMS)

    run(loop, main())


def test_a_model_that_cannot_be_loaded_is_the_users_error(tmp_path: Path, checkpoint: Path) -> None:
    specs = (
        EngineSpec(str(tmp_path)),
        EngineSpec(str(checkpoint), dtype="float12"),
        EngineSpec(str(checkpoint), EngineConfig(kv_memory=1e-9), device="cpu"),
    )
    engines = [RemoteEngine(spec) for spec in specs]
    for engine, reason in zip(engines, ("holds no checkpoint", "unknown dtype", "holds no block"), strict=True):
        with pytest.raises(UserError, match=reason):
            engine.wait()
        assert _is_gone(engine.pid)


def test_a_process_that_dies_while_loading(checkpoint: Path) -> None:
    engine = RemoteEngine(EngineSpec(str(checkpoint)))
    engine.kill()
    with pytest.raises(EngineGone, match="ended by signal 9 while it loaded"):
        engine.wait()


def test_messages_come_out_as_they_went_in_however_they_are_cut() -> None:
    messages = [b"", b"a", b"b" * 70_000, b"c" * 3]
    stream = b"".join(map(frame, messages))
    for size in (1, 5, 4096, len(stream)):
        frames = Frames()
        got = [m for at in range(0, len(stream), size) for m in frames.feed(stream[at : at + size])]
        assert got == messages


@pytest.mark.parametrize(
    "delta",
    [
        Delta("r", 0, "text", [1], [-0.5], [1]),
        Delta("r", 1, finish_reason="stop"),
        Delta("r", 0, "", [1, 2], [-1.0, 0.0], [1, 0], [[(1, -1.0), (3, -2.0)], []], queue_seconds=0.0),
        Delta("r", 0, finish_reason="error", error="why"),
        Delta("r", 0, finish_reason="length", embedding=[0.5, -0.25]),
    ],
)
def test_a_delta_survives_the_wire(delta: Delta) -> None:
    assert delta_of("r", row_of(7, delta)) == delta
