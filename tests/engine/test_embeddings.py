"""Embeddings: the mean of the final hidden states, whatever the way a prompt goes through the engine."""

from __future__ import annotations

import pytest
import torch
import transformers

from nanoworks.common.errors import UserError
from nanoworks.engine import Engine, EngineConfig, Request, SamplingParams
from nanoworks.models import build_model, config_from_dict

NOTHING = SamplingParams(max_tokens=0)
CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
PROMPTS = [[1, 2, 3, 4, 5] * 8, [7], [1, 2, 3, 4, 5] * 7 + [9] * 30, [1, 2, 3, 4, 5] * 8]


def embed(engine: Engine, prompts: list[list[int]]) -> list[list[float]]:
    requests = [Request(prompt, NOTHING, pooling="mean") for prompt in prompts]
    for request in requests:
        engine.add(request)
    found: dict[str, list[float]] = {}
    while engine.has_work:
        for delta in engine.step():
            if delta.embedding:
                assert delta.finish_reason == "length"
                assert delta.queue_seconds is not None
                assert delta.queue_seconds >= 0
                found[delta.request_id] = delta.embedding
    return [found[request.request_id] for request in requests]


@pytest.fixture(scope="module")
def reference() -> transformers.LlamaModel:
    torch.manual_seed(0)
    return transformers.LlamaModel(transformers.LlamaConfig(**CONFIG, attn_implementation="eager")).eval()


@pytest.fixture
def make(reference: transformers.LlamaModel):  # type: ignore[no-untyped-def]
    def make(**options: object) -> Engine:
        model = build_model(config_from_dict(CONFIG)).eval()
        model.init_weights()
        theirs = {
            name.replace("norm.weight", "head.norm.weight") if name == "norm.weight" else name: tensor
            for name, tensor in reference.state_dict().items()
        }
        missing, unexpected = model.load_state_dict(theirs, strict=False)
        assert (missing, unexpected) == (["head.lm_head.weight"], [])
        return Engine(model, None, EngineConfig(**options))

    return make


@pytest.mark.parametrize(
    "options",
    [{}, {"max_batch_tokens": 16}, {"block_size": 4}, {"num_blocks": 40, "block_size": 4, "max_batch_tokens": 24}],
    ids=["whole", "chunks", "portable", "few blocks"],
)
def test_equal_transformers(make, reference, options) -> None:  # type: ignore[no-untyped-def]
    with torch.no_grad():
        expected = [reference(torch.tensor([p])).last_hidden_state[0].mean(0) for p in PROMPTS]
    engine = make(**options)
    for _ in range(2):  # the second time the prompts are in the prefix cache, and must be read all the same
        for ours, theirs in zip(embed(engine, PROMPTS), expected, strict=True):
            torch.testing.assert_close(torch.tensor(ours), theirs, atol=2e-6, rtol=1e-5)
    assert engine.stats().blocks_used == 0


def test_beside_generation(make) -> None:  # type: ignore[no-untyped-def]
    """Neither changes the other, and a generation may use the blocks that an embedding left."""
    engine = make(max_batch_tokens=32)
    greedy = SamplingParams(max_tokens=8, temperature=0)
    [[alone]] = engine.generate([PROMPTS[0]], greedy)
    [expected] = embed(make(), [PROMPTS[0]])
    generation = Request(PROMPTS[0], greedy)
    engine.add(generation)
    [embedding] = embed(engine, [PROMPTS[0]])
    assert embedding == pytest.approx(expected, abs=2e-6)
    [[after]] = engine.generate([PROMPTS[0]], greedy)
    assert after.token_ids == alone.token_ids
    assert engine.stats().prefix_hits > 0


def test_values_that_are_not_finite_fail_by_name(make) -> None:  # type: ignore[no-untyped-def]
    engine = make()
    with torch.no_grad():
        engine.model.head.norm.weight.fill_(float("nan"))
    engine.add(Request([1, 2], NOTHING, pooling="mean"))
    [delta] = engine.step()
    assert (delta.finish_reason, delta.embedding) == ("error", [])
    assert "finite" in delta.error


def test_nothing_else_can_be_asked(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match="max_tokens=0"):
        make().add(Request([1, 2], SamplingParams(max_tokens=3), pooling="mean"))
