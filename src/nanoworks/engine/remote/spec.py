"""What another process needs to know to build an engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from nanoworks.engine.config import EngineConfig


@dataclass(frozen=True)
class EngineSpec:
    """A model and how to run it.

    Attributes:
        path: a run, a step, a model directory or a hub id.
        config: of the engine; `tensor_parallel` in it says over how many processes the model is spread.
        device: auto, cpu, cuda, xpu or mps.
        dtype: of the weights, e.g. "bfloat16"; None: as stored.
        warmup: run prompts of the usual lengths before the engine is called ready, so that nobody waits for what is
            built on first use.
    """

    path: str
    config: EngineConfig = field(default_factory=EngineConfig)
    device: str = "auto"
    dtype: str | None = None
    warmup: bool = False
