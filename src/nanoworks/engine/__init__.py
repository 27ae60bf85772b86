"""Generation and scoring for many requests at once: continuous batching over a paged KV cache."""

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
