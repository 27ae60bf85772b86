"""What nanochat (885a4f2) generated from its own checkpoint, token by token."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import nanoworks
from nanoworks.engine import Completion, Engine, EngineConfig, SamplingParams
from nanoworks.models import Decoder


@pytest.fixture(scope="module")
def golden(shared_dir: Path) -> dict[str, Any]:
    return json.loads((shared_dir / "golden/nanochat/old/golden.json").read_text(encoding="utf-8"))["engine"]


@pytest.fixture(scope="module")
def engine(shared_dir: Path) -> Engine:
    loaded = nanoworks.load(shared_dir / "golden/nanochat/old/base/base_checkpoints/d2", device="cpu")
    return Engine(loaded.model, loaded.tokenizer, EngineConfig(kv_memory=0.05))


@contextmanager
def scripted(model: Decoder, script: list[int]) -> Iterator[None]:
    """Force the first tokens that are sampled; after those the logits are the model's own."""
    rest = list(script)

    def force(head: torch.nn.Module, inputs: Any, logits: Tensor) -> Tensor | None:
        if not rest:
            return None
        return torch.full_like(logits, -1e4).index_fill_(-1, torch.tensor([rest.pop(0)]), 0.0)

    handle = model.head.register_forward_hook(force)
    try:
        yield
    finally:
        handle.remove()


def run(engine: Engine, prompt: list[int], max_tokens: int) -> Completion:
    return engine.generate([prompt], SamplingParams(max_tokens=max_tokens, temperature=0))[0][0]


def test_greedy(engine: Engine, golden: dict[str, Any]) -> None:
    cases = golden["greedy"]
    assert len(cases) == 5
    params = SamplingParams(max_tokens=64, temperature=0)
    together = engine.generate([case["prompt_ids"] for case in cases], params)
    for case, [completion] in zip(cases, together, strict=True):
        assert completion.token_ids == case["generate_batch"]
        assert completion.mask == case["masks"][len(case["prompt_ids"]) :]
        assert run(engine, case["prompt_ids"], 64).token_ids == case["stream"]


def test_tool_calls(engine: Engine, golden: dict[str, Any]) -> None:
    cases = golden["tool_use_scripted"]
    assert len(cases) == 7
    for case in cases:
        with scripted(engine._runner.model, case["scripted_prefix"]):
            completion = run(engine, case["prompt_ids"], len(case["tokens"]))
        assert completion.token_ids == case["tokens"], case["case"]
        assert completion.mask == case["masks"], case["case"]


def test_the_end_of_a_turn_is_kept_in_the_ids_and_left_out_of_the_text(engine: Engine, golden: dict[str, Any]) -> None:
    case = golden["terminal"]
    assert engine.tokenizer is not None
    prompt = golden["greedy"][0]["prompt_ids"]
    with scripted(engine._runner.model, case["script"]):
        streamed = [d.token_ids for d in engine.stream(prompt, SamplingParams(max_tokens=8, temperature=0))]
    assert streamed == [[column[0]] for column in case["stream_columns"]]
    with scripted(engine._runner.model, case["script"]):
        completion = run(engine, prompt, 8)
    assert completion.token_ids[:-1] == case["generate_batch_2"][0]
    assert completion.text == engine.tokenizer.decode(case["generate_batch_2"][0])
    assert completion.finish_reason == "stop"


def test_max_tokens_zero(engine: Engine, golden: dict[str, Any]) -> None:
    assert len(run(engine, golden["greedy"][0]["prompt_ids"], 0).token_ids) == golden["max_tokens_0"]
