"""From a specification to an engine, in the process that will run it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from nanoworks.checkpoint import load_checkpoint
from nanoworks.common.device import choose_device
from nanoworks.common.errors import UserError
from nanoworks.engine.engine import Engine
from nanoworks.engine.remote.spec import EngineSpec
from nanoworks.engine.request import SamplingParams
from nanoworks.engine.workers import Workers


def build(spec: EngineSpec) -> tuple[Engine, Mapping[str, Any]]:
    """Load the model and make its engine; return it with what the checkpoint says of its making.

    UserError as from `load_checkpoint` and `Engine`.
    """
    device, config = choose_device(spec.device), spec.config
    dtype = None if spec.dtype is None else getattr(torch, spec.dtype, None)
    if spec.dtype is not None and not isinstance(dtype, torch.dtype):
        raise UserError(f"unknown dtype {spec.dtype!r}; try 'float32' or 'bfloat16'")
    workers = Workers(config.tensor_parallel, device) if config.tensor_parallel > 1 else None
    if workers is None:
        checkpoint = load_checkpoint(spec.path, device=device, dtype=dtype, mapped=True)
    else:
        checkpoint = workers.load(spec.path, dtype=dtype)
    if checkpoint.tokenizer is None:
        raise UserError(f"{checkpoint.path} has no tokenizer; put tokenizer.json beside config.json")
    if config.speculate == "medusa" and config.draft_model is None:  # the heads are beside the model
        config = config.model_copy(update={"draft_model": str(checkpoint.path)})
    engine = Engine(checkpoint.model, checkpoint.tokenizer, config, workers=workers, consume=True)
    if spec.warmup:
        warm_up(engine)
    return engine, checkpoint.metadata


def warm_up(engine: Engine) -> None:
    """Run prompts of the usual shapes: short ones alone and many at once, long ones in one step and in several."""
    longest = engine.max_context - 2
    step = engine.config.max_batch_tokens
    for lengths in ([1], [16] * engine.config.max_num_seqs, [128], [512], [step], [step + step // 2]):
        prompts = [[i % 2] * min(length, longest) for i, length in enumerate(lengths)]
        engine.generate(prompts, SamplingParams(max_tokens=2, ignore_eos=True))
