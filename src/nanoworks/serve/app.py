"""The HTTP side of `nanoworks serve`: OpenAI's chat completions over one engine, and the chat page at /.

    POST /v1/chat/completions    GET /v1/models    GET /v1/models/{id}    GET /health    GET /

A client that goes away cancels its request: nobody reads the rest of that answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from nanoworks.engine import AsyncEngine, Engine, SamplingParams
from nanoworks.serve.completion import ChatAnswer
from nanoworks.serve.errors import ApiError, add_error_handlers, as_api_error
from nanoworks.serve.protocol import ChatRequest, ModelCard, ModelList

T = TypeVar("T")

UI = Path(__file__).parent / "ui"

# The page loads nothing from elsewhere and runs no script written into it, whatever a model answers.
PAGE_POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
CLIENT_LEFT = 499  # nginx's status for a request whose client went away; nobody is there to read it


def create_app(engine: Engine, *, name: str) -> FastAPI:
    """Return the app that serves `engine` under the model name `name`."""
    assert engine.tokenizer is not None, "a chat needs a tokenizer"
    tokenizer, context = engine.tokenizer, engine.max_context
    async_engine = AsyncEngine(engine)
    card = ModelCard(id=name, created=int(time.time()), max_model_len=context)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(async_engine.shutdown)

    # FastAPI's own documentation pages load scripts from a CDN, so only the schema is served.
    app = FastAPI(title=name, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.engine = async_engine
    add_error_handlers(app)
    app.mount("/ui", StaticFiles(directory=UI))

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(UI / "index.html", headers={"Content-Security-Policy": PAGE_POLICY})

    @app.get("/health")
    async def health() -> dict[str, str]:
        if async_engine.error is not None:
            raise ApiError(503, "the engine has failed; see the server's log and restart it")
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[card])

    @app.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> ModelCard:
        check_model(model_id)
        return card

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        check_model(body.model)
        async_engine.check_queue()  # here, where it can still become a status
        prompt = tokenizer.render_for_completion(conversation(body))
        if len(prompt) >= context:
            raise ApiError(
                400,
                f"the conversation has {len(prompt)} tokens and the model's context holds {context}, "
                "the answer included; shorten it or begin a new one",
                param="messages",
                code="context_length_exceeded",
            )
        answer = ChatAnswer(
            async_engine,
            tokenizer,
            prompt,
            sampling(body, context),
            model=name,
            priority=-body.priority,  # the engine's are the other way round
            client=body.user,
            cache_salt=body.prompt_cache_key,
        )
        if body.stream:
            return EventStream(events(answer, body))
        whole = await unless_client_leaves(request, answer.whole())
        return Response(status_code=CLIENT_LEFT) if whole is None else JSONResponse(whole.model_dump())

    def check_model(asked: str | None) -> None:
        if asked not in (None, name):
            raise ApiError(
                404, f"there is no model {asked!r} here, only {name!r}", param="model", code="model_not_found"
            )

    return app


def conversation(body: ChatRequest) -> dict[str, Any]:
    """Return the messages in the form the tokenizer renders; ApiError 400 when there is nothing to answer."""
    if body.messages[-1].role != "user":
        raise ApiError(400, "the last message must be the user's: it is the one to answer", param="messages")
    return {"messages": [message.in_house_form() for message in body.messages]}


def sampling(body: ChatRequest, context: int) -> SamplingParams:
    """Translate the request. Without a limit an answer may fill the context; the engine clips to that."""
    return SamplingParams(
        max_tokens=body.max_completion_tokens or body.max_tokens or context,
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        logit_bias=body.logit_bias,
        min_tokens=body.min_tokens,
        n=body.n,
        stop=tuple(body.stop),
        seed=body.seed,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        grammar=body.response_format.grammar(),
    )


async def events(answer: ChatAnswer, body: ChatRequest) -> AsyncGenerator[str, None]:
    """Yield the answer as server-sent events. The status is long sent, so an error becomes an event too."""
    try:
        async with aclosing(answer.chunks()) as chunks:
            async for chunk in chunks:
                yield f"data: {chunk.model_dump_json()}\n\n"
        if body.stream_options and body.stream_options.include_usage:
            yield f"data: {answer.usage_chunk().model_dump_json()}\n\n"
    except Exception as error:
        yield f"data: {as_api_error(error).body.model_dump_json()}\n\n"
    yield "data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """Server-sent events from an async generator, which is closed at once when the client leaves."""

    def __init__(self, content: AsyncGenerator[str, None]) -> None:
        # Proxies that buffer would turn the stream into one block.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(content, headers=headers, media_type="text/event-stream")
        self._content = content

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._content):
            await super().__call__(scope, receive, send)


async def unless_client_leaves(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """Return what `work` returns, or cancel it and return None when the client disconnects first."""

    async def client_left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(client_left())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
