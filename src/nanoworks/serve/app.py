"""Puts the server together: OpenAI's API over one engine, and the chat page at /. The routes are in `routes`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from nanoworks.common.errors import UserError, missing_extra
from nanoworks.serve.document import ERRORS, add_document
from nanoworks.serve.errors import add_error_handlers
from nanoworks.serve.metrics import CountAnswers, Metrics
from nanoworks.serve.middleware import add_middleware
from nanoworks.serve.middleware.access_log import RecordGenerations
from nanoworks.serve.protocol.models import ModelCard
from nanoworks.serve.routes import chat, completions, embeddings, metrics, models, page, probes, tokens
from nanoworks.serve.settings import ServerSettings
from nanoworks.serve.state import ServerState

if TYPE_CHECKING:
    from nanoworks.engine.client import EngineClient
    from nanoworks.serve.auth.access import Access

ROUTES = (chat, completions, embeddings, tokens, models, probes, page, metrics)


def create_app(
    engine: EngineClient,
    *,
    name: str,
    settings: ServerSettings | None = None,
    access: Access | None = None,
    lineage: Mapping[str, Any] | None = None,
) -> FastAPI:
    """Return the app that serves `engine` under the model name `name`; it shuts `engine` down at its end.

    Args:
        access: what `open_access` gave for the settings; None: it is opened here.
        lineage: what the checkpoint says of its making (`Checkpoint.metadata`), for /v1/models.
    """
    assert engine.tokenizer is not None, "a server needs a tokenizer"
    lineage = dict(lineage or {})
    card = ModelCard(
        id=name,
        created=int(time.time()),
        max_model_len=engine.max_context,
        run_id=lineage.pop("run_id", None),
        lineage=lineage,
    )
    state = ServerState(engine, engine.tokenizer, card, settings or ServerSettings())
    access = access or open_access(state.settings)
    if access is not None:
        state.guard = access.guard
        state.observers.append(access.limiter)
    state.observers.append(RecordGenerations(engine.tokenizer if state.settings.log_prompts else None))
    state.metrics = Metrics(engine, model_name=name)
    state.observers.append(state.metrics)  # the last: it counts what the others let pass

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with access or nullcontext():
            yield
            await asyncio.to_thread(engine.shutdown)

    # FastAPI's own documentation pages load scripts from a CDN, so only the schema is served.
    app = FastAPI(title=name, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.server = state
    add_error_handlers(app)
    add_middleware(app, state.settings, state.guard)
    app.add_middleware(CountAnswers, metrics=state.metrics)  # the outermost: it sees what the others refuse
    for module in ROUTES:
        app.include_router(module.router, responses=ERRORS)
    add_document(app, auth=state.guard is not None)
    return app


def open_access(settings: ServerSettings) -> Access | None:
    """Return what knows the keys; None where everybody may call."""
    if not settings.auth:
        if settings.redis_url is not None:
            raise UserError("limits belong to keys, so a Redis for them is of no use without --auth")
        return None
    try:
        from nanoworks.serve.auth.access import Access
    except ImportError:
        raise missing_extra("SQLAlchemy", "server") from None
    return Access(keys_db=settings.keys_db, redis_url=settings.redis_url)
