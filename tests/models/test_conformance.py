"""What every family must satisfy: equal to its reference in transformers, and to itself through a file, through
its config, in documents, and in random chunks over the paged cache. A family enters through families.TINY."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from nanoworks.checkpoint import load_checkpoint, save_checkpoint
from nanoworks.checkpoint.keymap import KeyMap
from nanoworks.models import ARCHITECTURES, Decoder, config_from_hf
from nanoworks.nn.context import DenseContext
from tests.models.families import COMPARED, CONTEXT, TINY, VARIANTS, families, make, name_of

T = CONTEXT + 16  # beyond every window and beyond the original context of every scaled RoPE


def save(model: Decoder, directory: Path) -> Path:
    with save_checkpoint(directory, model, None, metadata={}):
        pass
    return directory


def reference_of(model: Decoder, directory: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(save(model, directory), attn_implementation="eager")
    assert type(reference).__name__ == model.config.hf_architecture
    if model.config.model_type == "nanochat":  # the original keeps cosines and sines in bfloat16, transformers does not
        model.rope.table_dtype = torch.float32
    return reference.eval()


def test_every_family_is_under_the_suite() -> None:
    assert set(families()) == TINY.keys()


@pytest.mark.parametrize("variant", COMPARED, ids=name_of)
def test_logits_loss_and_gradients_equal_transformers(tmp_path: Path, variant: tuple[str, dict[str, Any]]) -> None:
    family, changes = variant
    model = make(family, **changes)
    reference = reference_of(model, tmp_path / "m")
    tokens = torch.randint(0, 96, (2, T))
    ours = model.head(model(tokens, DenseContext(tokens)))
    theirs = reference(tokens).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)

    targets = tokens.roll(-1, 1)
    loss = model.head.loss(model(tokens, DenseContext(tokens)), targets, torch.ones(2, T)) / (2 * T)
    expected = torch.nn.functional.cross_entropy(theirs.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    loss.backward()
    expected.backward()
    pairs = dict(_gradients(model, reference))
    assert len(pairs) >= 5
    for name, (mine, other) in pairs.items():
        scale = other.abs().max().clamp(min=1e-4)  # the gradient of a single normalised expert's router is 0
        torch.testing.assert_close(mine / scale, other / scale, atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def _gradients(model: Decoder, reference: torch.nn.Module) -> Any:
    """Pairs of gradients of the tensors that have the same name on both sides, and of stacked experts."""
    keymap = KeyMap(ARCHITECTURES.get(model.config.model_type).keymaps["hf"])
    theirs = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        foreign = keymap.to_foreign(name)
        if foreign in theirs:
            yield name, (parameter.grad, theirs[foreign].grad)
        elif name.endswith("experts.down_proj.weight"):
            yield name, (parameter.grad, theirs[f"model.{name.removesuffix('.weight')}"].grad)
        elif name.endswith("experts.gate_proj.weight"):
            fused = theirs[f"model.{name.replace('gate_proj.weight', 'gate_up_proj')}"].grad
            yield name, (parameter.grad, fused.chunk(2, dim=1)[0])
        elif name.endswith("mlp.gate.weight"):
            yield name, (parameter.grad, theirs[f"model.{name}"].grad)


@pytest.mark.parametrize("variant", COMPARED, ids=name_of)
def test_a_checkpoint_of_transformers_comes_back_byte_for_byte(
    tmp_path: Path, variant: tuple[str, dict[str, Any]]
) -> None:
    reference = reference_of(make(variant[0], **variant[1]), tmp_path / "ours")
    reference.save_pretrained(tmp_path / "theirs")
    loaded = load_checkpoint(tmp_path / "theirs")
    save(loaded.model, tmp_path / "back")
    first, back = (tmp_path / d / "model.safetensors" for d in ("theirs", "back"))
    assert first.read_bytes() == back.read_bytes()
    raw = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert config_from_hf(raw).to_hf() == raw


@pytest.mark.parametrize("variant", COMPARED, ids=name_of)
def test_greedy_tokens_of_an_export_equal_transformers(tmp_path: Path, variant: tuple[str, dict[str, Any]]) -> None:
    model = make(variant[0], **variant[1])
    if model.config.rope_scaling is not None and model.config.rope_scaling.rope_type in ("dynamic", "longrope"):
        pytest.skip("transformers' cache keeps keys that were rotated for a shorter length")
    reference = reference_of(model, tmp_path / "m")
    prompt = torch.randint(0, 96, (1, 6))
    expected = reference.generate(prompt, max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0)
    tokens = prompt
    with torch.no_grad():
        for _ in range(64):
            logits = model.head(model(tokens, DenseContext(tokens))[:, -1])
            tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    assert tokens.tolist() == expected.tolist()


@pytest.mark.parametrize("family", families())
def test_own_checkpoint_comes_back_byte_for_byte(tmp_path: Path, family: str) -> None:
    model = make(family)
    with save_checkpoint(tmp_path / "a", model, None, metadata={"run_id": "x"}):
        pass
    loaded = load_checkpoint(tmp_path / "a")
    assert loaded.config == model.config.model_copy(update={"raw": loaded.config.raw})
    assert loaded.metadata == {"run_id": "x"}
    with save_checkpoint(tmp_path / "b", loaded.model, None, metadata={"run_id": "x"}):
        pass
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("family", list(TINY))
def test_document_mask_separates_documents(family: str) -> None:
    model = make(family)
    tokens = torch.randint(0, 96, (1, 12))
    documents = torch.tensor([[0] * 5 + [1] * 7])
    with torch.no_grad():
        row = model(tokens, DenseContext(tokens, documents=documents))
        first = model(tokens[:, :5], DenseContext(tokens[:, :5]))
    torch.testing.assert_close(row[:, :5], first, atol=1e-5, rtol=0)
    changed = tokens.clone()
    for place in (2, 4):  # inside the first document, and its last token
        changed[0, place] = (changed[0, place] + 1) % 96
    with torch.no_grad():
        other = model(changed, DenseContext(changed, documents=documents))
    torch.testing.assert_close(row[:, 5:], other[:, 5:], atol=1e-6, rtol=0)


@pytest.mark.parametrize("block_size", [4, 8], ids=["torch", "kernels"])  # the CPU kernels know blocks of 8 only
@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_paged_in_random_chunks_equals_dense(variant: tuple[str, dict[str, Any]], block_size: int) -> None:
    from nanoworks.engine import Engine, EngineConfig, SamplingParams

    model = make(variant[0], **variant[1])
    if model.config.rope_scaling is not None and model.config.rope_scaling.rope_type in ("dynamic", "longrope"):
        pytest.skip("a key keeps the rotation of the length at which it was cached")
    chooser = random.Random(1)
    prompts = [[chooser.randrange(96) for _ in range(n)] for n in (1, 7, 30, 50)]
    engine = Engine(model, None, EngineConfig(max_batch_tokens=11, block_size=block_size, kv_memory=0.01))
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    for prompt, [completion] in zip(prompts, engine.generate(prompts, params), strict=True):
        tokens = torch.tensor([prompt + completion.token_ids])
        with torch.no_grad():
            logits = model.head(model(tokens, DenseContext(tokens)))[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == completion.token_ids
