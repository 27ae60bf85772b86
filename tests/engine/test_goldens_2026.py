"""What nanochat (92d63d4) generated from its own checkpoint, and our paged cache against its logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import nanoworks
from nanoworks.engine import Engine, EngineConfig, SamplingParams
from nanoworks.models import Decoder
from nanoworks.nn.paged import KVCache, KVShape, PagedContext
from nanoworks.nn.paged_inputs import PagedInputs
from tests.engine.test_goldens import run, scripted

BLOCK_SIZE = 16
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def new(shared_dir: Path) -> Path:
    return shared_dir / "golden" / "nanochat" / "new"


@pytest.fixture(scope="module")
def golden(new: Path) -> dict[str, Any]:
    return json.loads((new / "golden.json").read_text(encoding="utf-8"))["engine"]


@pytest.fixture(scope="module")
def engine(new: Path) -> Engine:
    loaded = nanoworks.load(new / "base/base_checkpoints/d4", device="cpu")
    return Engine(loaded.model, loaded.tokenizer, EngineConfig(kv_memory=0.05))


def paged_logits(model: Decoder, ids: list[int], chunks: list[int]) -> Tensor:
    """Logits (sum of chunks, V) of one sequence that is fed chunk after chunk."""
    blocks = -(-len(ids) // BLOCK_SIZE)
    cache = KVCache(KVShape.of(model, CPU), blocks + 1, BLOCK_SIZE, CPU)
    cache.apply([], list(range(1, blocks + 1)))
    out, done = [], 0
    for size in chunks:
        part = torch.tensor(ids[done : done + size])
        positions = torch.arange(done, done + size)
        tables = -(-(done + size) // BLOCK_SIZE)
        context = PagedContext(
            cache,
            PagedInputs(
                tokens=part,
                positions=positions,
                prev_tokens=torch.tensor([-1, *ids])[done : done + size],
                slots=positions + BLOCK_SIZE,
                block_tables=torch.arange(1, tables + 1)[None],
                block_counts=[tables],
                query_lengths=[size],
                context_lengths=[done + size],
            ),
        )
        out.append(model.head(model(part, context)))
        done += size
    return torch.cat(out)


@pytest.mark.parametrize("chunks", [[200], [140, *[1] * 60], [20, 13, 1, 100, 66], [3] * 66 + [2]], ids=str)
def test_chunks_through_the_paged_cache_give_the_logits_of_one_pass(
    new: Path, engine: Engine, chunks: list[int]
) -> None:
    ids, x = [], 1337
    for _ in range(200):
        x = (1103515245 * x + 12345) % 2**31
        ids.append((x >> 8) % (1024 - 9))
    with torch.no_grad():
        logits = paged_logits(engine.model, ids, chunks)
    expected = torch.from_numpy(np.load(new / "tensors.npz")["base_d4.logits_b0"])
    torch.testing.assert_close(logits[::4], expected, atol=2e-5, rtol=0.0)


def test_greedy(engine: Engine, golden: dict[str, Any]) -> None:
    cases = golden["greedy"]
    assert len(cases) == 5
    params = SamplingParams(max_tokens=64, temperature=0)
    together = engine.generate([case["prompt_ids"] for case in cases], params)
    for case, [completion] in zip(cases, together, strict=True):
        assert completion.token_ids == case["generate_batch"] == case["naive_model_generate"][-64:]
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


def test_the_end_of_a_turn_ends_the_answer(engine: Engine, golden: dict[str, Any]) -> None:
    case = golden["terminal"]
    with scripted(engine._runner.model, case["script"]):
        completion = run(engine, golden["greedy"][0]["prompt_ids"], 8)
    assert completion.token_ids[:-1] == case["generate_batch_2"][0]
    assert completion.finish_reason == "stop"


def test_a_prompt_longer_than_the_window_in_small_chunks(new: Path) -> None:
    """Greedy text after 180 tokens, of which the short layers see 129, is the same however the prompt is cut."""
    loaded = nanoworks.load(new / "base/base_checkpoints/d4", device="cpu")
    ids, x = [], 7
    for _ in range(180):
        x = (1103515245 * x + 12345) % 2**31
        ids.append((x >> 8) % (1024 - 9))
    answers = []
    for budget in (512, 24):
        config = EngineConfig(kv_memory=0.05, max_batch_tokens=budget)
        answers.append(run(Engine(loaded.model, loaded.tokenizer, config), ids, 40).token_ids)
    assert answers[0] == answers[1]
    tokens = list(ids)
    for _ in range(8):  # and the same as recomputing everything for each token
        tokens.append(int(loaded.logits(torch.tensor([tokens]))[0, -1].argmax()))
    assert answers[0][:8] == tokens[180:]
