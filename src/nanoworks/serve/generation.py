"""The one place where a request meets the engine: who may refuse it, and who counts it, sees it here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Literal

from nanoworks.engine import Delta, Request, SamplingParams
from nanoworks.engine.request import NOT_FINITE
from nanoworks.serve.caller import Caller
from nanoworks.serve.errors import ApiError, as_api_error
from nanoworks.serve.observer import Observer
from nanoworks.serve.state import ServerState

log = logging.getLogger("nanoworks")
_finishing: set[asyncio.Task[None]] = set()


class Generation:
    """One prompt on its way through the engine.

    Args:
        state: of the app.
        caller: who pays for it.
        endpoint: the route's path, for logs and metrics.
        prompt_ids, params, priority, cache_salt, pooling: as in the engine's `Request`.
        user: who waits for it, where no key says so: waiting requests of different users take turns.

    Attributes:
        request_id: unique; in the server's logs.
        arrival: seconds of `time.perf_counter`.
        queue_seconds: how long it waited for its first step; None before that.
        prompt_tokens, completion_tokens: so far.
        cached_tokens: of the prompt, which were in the prefix cache.
        finish_reasons: of the samples that have ended, in the order in which they did.
        error: what the client was told, if it failed.
    """

    def __init__(
        self,
        state: ServerState,
        caller: Caller,
        endpoint: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        user: str = "",
        cache_salt: str = "",
        pooling: Literal["mean"] | None = None,
    ) -> None:
        if priority > 0 and state.guard is not None and caller.role != "admin":
            raise ApiError(
                403, "only an admin's key may go before others: priority must be 0 or more", param="priority"
            )
        self._request = Request(
            prompt_ids,
            params,
            priority=priority,
            client=caller.key_id or user,
            cache_salt=cache_salt,
            pooling=pooling,
        )
        self.request_id = self._request.request_id
        self.caller = caller
        self.endpoint = endpoint
        self.prompt_ids = prompt_ids
        self.params = params
        self.arrival = self._request.arrival
        self.queue_seconds: float | None = None
        self.prompt_tokens = len(prompt_ids)
        self.completion_tokens = self.cached_tokens = 0
        self.finish_reasons: list[str] = []
        self.error: ApiError | None = None
        self._state = state

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Yield what the engine adds, to be read once. Closing the iterator cancels the request.

        Raises:
            ApiError: refused by an observer or by the engine, or failed.
        """
        admitted: list[Observer] = []
        engine = self._state.engine
        try:
            engine.check_queue()  # before anybody counts it
            for observer in self._state.observers:
                await observer.admit(self)
                admitted.append(observer)
            async with aclosing(engine.submit(self._request)) as deltas:
                async for delta in deltas:
                    self._take(delta)
                    for observer in admitted:
                        observer.delta(self, delta)
                    yield delta
        except Exception as error:
            self.error = as_api_error(error)
            raise self.error from error
        finally:
            if admitted:
                # In a task of its own: whoever cancels this one must not cut the accounting short.
                task = asyncio.ensure_future(self._finish(admitted))
                _finishing.add(task)  # the event loop itself keeps no task alive
                task.add_done_callback(_finishing.discard)
                await asyncio.shield(task)

    def _take(self, delta: Delta) -> None:
        if delta.queue_seconds is not None:
            self.queue_seconds, self.cached_tokens = delta.queue_seconds, delta.cached_tokens
        self.completion_tokens += len(delta.token_ids)
        if delta.finish_reason is None:
            return
        self.finish_reasons.append(delta.finish_reason)
        if delta.error and delta.error != NOT_FINITE:  # a grammar that is wrong, or too much
            raise ApiError(400, delta.error, param="response_format")
        if delta.finish_reason == "error":
            raise ApiError(500, "the model computed values that are not finite; there is no answer")
        if delta.finish_reason == "cancelled":
            raise ApiError(503, "the server is stopping")

    async def _finish(self, admitted: list[Observer]) -> None:
        for observer in admitted:
            try:
                await observer.finished(self)
            except Exception:  # a store that is away, say: the answer is made, and the others are told
                log.exception("a finished request could not be accounted")


async def together(jobs: Sequence[Generation]) -> AsyncGenerator[tuple[int, Delta], None]:
    """Yield the deltas of several jobs as they come, each with its job's index. When one fails, all end."""
    if len(jobs) == 1:  # nearly always
        async with aclosing(jobs[0].deltas()) as deltas:
            async for delta in deltas:
                yield 0, delta
        return
    queue: asyncio.Queue[tuple[int, Delta] | BaseException | None] = asyncio.Queue()

    async def read(index: int, job: Generation) -> None:
        try:
            async with aclosing(job.deltas()) as deltas:
                async for delta in deltas:
                    queue.put_nowait((index, delta))
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    readers = [asyncio.ensure_future(read(index, job)) for index, job in enumerate(jobs)]
    try:
        running = len(readers)
        while running:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
