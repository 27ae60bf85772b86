"""Each family against the reference implementation in transformers, on tiny random configurations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nanoworks.checkpoint import load_checkpoint, save_checkpoint
from nanoworks.models import ARCHITECTURES, build_model, config_from_dict
from nanoworks.nn.context import DenseContext

TINY = {
    "llama": {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    },
    "nanochat": {
        "vocab_size": 96,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
    },
}


def make(family: str, **changes: object) -> torch.nn.Module:
    torch.manual_seed(0)
    model = build_model(config_from_dict({"model_type": family, **TINY[family], **changes}))
    for parameter in model.parameters():  # the families' own initialisation zeroes some matrices
        torch.nn.init.normal_(parameter, std=0.08)
    return model.eval()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
        ("nanochat", {}),
    ],
)
def test_logits_loss_and_gradients_equal_transformers(tmp_path: Path, family: str, changes: dict[str, object]) -> None:
    from transformers import AutoModelForCausalLM

    model = make(family, **changes)
    with save_checkpoint(tmp_path / "m", model, None, metadata={}):
        pass
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation="eager")
    assert type(reference).__name__ == model.config.hf_architecture
    if family == "nanochat":  # the original keeps cosines and sines in bfloat16, transformers does not
        model.rope.table_dtype = torch.float32
    tokens = torch.randint(0, 96, (2, 50))
    ours = model.head(model(tokens, DenseContext(tokens)))
    theirs = reference(tokens).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)

    targets = tokens.roll(-1, 1)
    loss = model.head.loss(model(tokens, DenseContext(tokens)), targets, torch.ones(2, 50)) / 100
    expected = torch.nn.functional.cross_entropy(theirs.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    loss.backward()
    expected.backward()
    name = "layers.1.self_attn.q_proj.weight"
    torch.testing.assert_close(
        model.get_parameter(name).grad, reference.get_parameter(f"model.{name}").grad, rtol=1e-4, atol=1e-7
    )
    torch.testing.assert_close(
        model.embed_tokens.weight.grad, reference.model.embed_tokens.weight.grad, rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("family", list(TINY))
def test_checkpoint_round_trip_is_byte_identical(tmp_path: Path, family: str) -> None:
    model = make(family)
    with save_checkpoint(tmp_path / "a", model, None, metadata={"run_id": "x"}):
        pass
    loaded = load_checkpoint(tmp_path / "a")
    assert loaded.config == model.config.model_copy(update={"unknown": loaded.config.unknown})
    assert loaded.metadata == {"run_id": "x"}
    with save_checkpoint(tmp_path / "b", loaded.model, None, metadata={"run_id": "x"}):
        pass
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("family", list(ARCHITECTURES))
def test_document_mask_separates_documents(family: str) -> None:
    model = make(family)
    tokens = torch.randint(0, 96, (1, 12))
    documents = torch.tensor([[0] * 5 + [1] * 7])
    with torch.no_grad():
        row = model(tokens, DenseContext(tokens, documents=documents))
        first = model(tokens[:, :5], DenseContext(tokens[:, :5]))
    torch.testing.assert_close(row[:, :5], first, atol=1e-5, rtol=0)
    changed = tokens.clone()
    changed[0, 2] = (changed[0, 2] + 1) % 96
    with torch.no_grad():
        other = model(changed, DenseContext(changed, documents=documents))
    torch.testing.assert_close(row[:, 5:], other[:, 5:], atol=0, rtol=0)
