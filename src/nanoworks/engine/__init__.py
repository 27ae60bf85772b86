"""Generation and scoring for many requests at once: continuous batching over a paged KV cache."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__all__ = [
    "AsyncEngine",
    "Completion",
    "Delta",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "Loglikelihood",
    "QueueFull",
    "Request",
    "SamplingParams",
    "WorkerError",
    "Workers",
]

if TYPE_CHECKING:
    from nanoworks.engine.async_engine import AsyncEngine
    from nanoworks.engine.config import EngineConfig
    from nanoworks.engine.engine import Engine
    from nanoworks.engine.request import (
        Completion,
        Delta,
        EngineStats,
        Loglikelihood,
        QueueFull,
        Request,
        SamplingParams,
    )
    from nanoworks.engine.workers import WorkerError, Workers

_HOMES = {
    "AsyncEngine": "async_engine",
    "Engine": "engine",
    "EngineConfig": "config",
    "WorkerError": "workers",
    "Workers": "workers",
}


def __getattr__(name: str) -> Any:
    # Deferred, so that a server can speak of requests without torch; that is in the engine's own process.
    if name in __all__:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'request')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
