"""Ours, through `nanoworks.engine.Engine` as `nanoworks serve` has it."""

from __future__ import annotations

import torch

from nanoworks.checkpoint import load_checkpoint
from nanoworks.common.allocator import keep_freed_memory
from nanoworks.engine import Engine, EngineConfig, SamplingParams


class Adapter:
    def __init__(self, model: str, precision: str, threads: int, **config: object) -> None:
        keep_freed_memory()
        torch.set_num_threads(threads)
        checkpoint = load_checkpoint(model, dtype=torch.bfloat16)
        if precision != "bf16":
            config["quantize"] = precision
        self.engine = Engine(checkpoint.model, None, EngineConfig(kv_memory=1.0, **config))  # type: ignore[arg-type]

    def generate(self, prompts: list[list[int]], counts: list[int]) -> list[list[int]]:
        params = [SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True) for n in counts]
        return [c.token_ids for [c] in self.engine.generate(prompts, params)]
