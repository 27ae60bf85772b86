"""GGUF: what we write is what llama.cpp computes, by loading it there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as token_models

from nanoworks.checkpoint import parity
from nanoworks.checkpoint.convert import convert
from nanoworks.checkpoint.gguf import llama_cpp
from nanoworks.checkpoint.gguf.export import FILE, gguf_name, interleave
from nanoworks.checkpoint.gguf.tokenizer import GgufTokenizer
from nanoworks.common.errors import UserError
from nanoworks.nn import functional as NF
from nanoworks.nn.context import DenseContext
from nanoworks.tokenizer import Tokenizer
from tests.checkpoint import models

if not llama_cpp.installed():
    pytest.skip("llama.cpp is not installed: pip install 'nanoworks[gguf]'", allow_module_level=True)

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = (*parity.TEXTS, "it's 7 of 27\n\n  indented", " leading, trailing ", "a" * 40, "Ünïcödé — ¿qué?")


def certificate(path: Path) -> dict:
    return json.loads((path / parity.FILE).read_text())


def greedy(model: torch.nn.Module, prompt: Sequence[int], count: int) -> list[int]:
    tokens = torch.tensor([prompt])
    with torch.inference_mode():
        for _ in range(count):
            logits = model.head(model(tokens, DenseContext(tokens))[:, -1:])
            tokens = torch.cat([tokens, logits.argmax(-1)], dim=1)
    return tokens[0, len(prompt) :].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_same_greedy_tokens(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    model = models.make(family, seed=1)  # without near ties, which the rounding of float16 would decide
    convert(models.save(tmp_path / "in", model), tmp_path / "out", "gguf", dtype=dtype)
    found = certificate(tmp_path / "out")
    assert found["verified"]
    assert found["result_read_by"].startswith("llama.cpp")
    assert found["max_logit"] > 3
    if dtype == torch.float32:
        assert found["max_logit_difference"] < 1e-4
    if family == "mistral":
        return  # its window of 96 is the context in GGUF, too short for 64 more
    prompt = models.tokenizer().encode("the quick brown", bos=True)
    ours = greedy(model.to(dtype).float(), prompt, 64)
    theirs = llama_cpp.LlamaCpp(tmp_path / "out" / FILE).generate(prompt, 64)
    if dtype == torch.float16 and family in ("mixtral", "qwen3_moe"):
        assert ours[:8] == theirs[:8]  # then rounding sends a token to another expert
    else:
        assert ours == theirs


SCALINGS = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "yarn-amplitude": {"factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.3},
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_scaled_rope(tmp_path: Path, kind: str) -> None:
    """On 160 tokens, beyond what the scaling starts from."""
    model = models.make("llama", rope_scaling={"rope_type": kind.split("-")[0], **SCALINGS[kind]})
    convert(models.save(tmp_path / "in", model), tmp_path / "out", "gguf", verify=False)
    side = llama_cpp.LlamaCpp(tmp_path / "out" / FILE)
    tokens = torch.randint(300, (1, 160), generator=torch.Generator().manual_seed(0))
    expected = parity.Whole(model).logits(tokens)[:, 150:].log_softmax(-1)
    found = side.log_probabilities(tokens, first=150)
    torch.testing.assert_close(found, expected[..., : found.size(-1)], atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("nanochat", {}, "this is a nanochat"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is false"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "some layers are dense"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}},
            "longrope is not written",
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    tmp_path: Path, family: str, changes: dict, words: str
) -> None:
    source = models.save(tmp_path / "in", models.make(family, **changes))
    with pytest.raises(UserError, match=words):
        convert(source, tmp_path / "out", "gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    source = models.save(tmp_path / "in", models.make())
    (source / "manifest.json").unlink()
    (source / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        convert(source, tmp_path / "out", "gguf")


def test_a_window_becomes_the_context(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    convert(models.save(tmp_path / "in", models.make("mistral")), tmp_path / "out", "gguf", verify=False)
    fields = gguf.GGUFReader(tmp_path / "out" / FILE).fields
    assert fields["llama.context_length"].contents() == 96
    assert fields["tokenizer.chat_template"].contents() == (tmp_path / "in" / "chat_template.jinja").read_text()


def test_names_and_rotation() -> None:
    assert gguf_name("layers.12.self_attn.q_proj.weight") == "blk.12.attn_q.weight"
    assert gguf_name("head.lm_head.weight") == "output.weight"
    # Rotating neighbours of interleaved rows is rotating halves of ours.
    weight, angle = torch.randn(2 * 8, 5), torch.rand(4)
    x = torch.randn(5)
    ours = NF.apply_rope((weight @ x).view(2, 8), angle.cos(), angle.sin())
    pairs = (interleave(weight, 8) @ x).view(2, 4, 2)
    turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.polar(torch.ones(4), angle))
    torch.testing.assert_close(turned.transpose(1, 2).reshape(2, 8), ours)


def llama3_like(path: Path, pattern: str = LLAMA3) -> None:
    tokenizer = tokenizers.Tokenizer(token_models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([models.TEXT], trainer)
    tokenizer.save(str(path / "tokenizer.json"))


def sentencepiece_like(path: Path) -> None:
    """As Llama 2 has it: spaces as U+2581, one before the text, bytes for what is unknown."""
    tokenizer = tokenizers.Tokenizer(token_models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=[*special, *byte_tokens], show_progress=False)
    tokenizer.train_from_iterator(models.TEXT.split("naïve")[0].split(), trainer)
    document = json.loads(tokenizer.to_str())
    document["added_tokens"] = document["added_tokens"][:3]
    (path / "tokenizer.json").write_text(json.dumps(document))


def with_tokenizer(path: Path, write, **changes) -> Path:
    """A tiny llama whose tokenizer `write` makes."""
    source = models.save(path, models.make(vocab_size=400, **changes))
    for name in ("manifest.json", "tokenizer.json", "chat_template.jinja"):
        (source / name).unlink()
    (source / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true}')
    write(source)
    return source


@pytest.mark.parametrize("write", [llama3_like, sentencepiece_like])
def test_other_vocabularies_encode_the_same(tmp_path: Path, write) -> None:
    source = with_tokenizer(tmp_path / "in", write)
    convert(source, tmp_path / "out", "gguf")
    found = certificate(tmp_path / "out")
    assert "note" not in found
    assert found["tokenizer"] == {"texts": len(parity.TEXTS), "same_ids": len(parity.TEXTS)}
    theirs, ours = llama_cpp.LlamaCpp(tmp_path / "out" / FILE), Tokenizer.load(source)
    for text in TEXTS:
        assert theirs.encode(text) == ours.encode(text), text


def test_our_vocabulary_differs_in_long_numbers_only_and_says_so(tmp_path: Path) -> None:
    convert(models.save(tmp_path / "in", models.make()), tmp_path / "out", "gguf")
    found = certificate(tmp_path / "out")
    assert "numbers of three digits and more" in found["note"]
    theirs, ours = llama_cpp.LlamaCpp(tmp_path / "out" / FILE), models.tokenizer()
    for text in TEXTS[1:]:
        assert theirs.encode(text) == ours.encode(text), text


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    source = with_tokenizer(tmp_path / "in", lambda path: llama3_like(path, r"\w+|\W"))
    with pytest.raises(UserError, match="no split like this tokenizer's"):
        GgufTokenizer(source, 400)
    with pytest.raises(UserError, match="no split like this tokenizer's"):
        convert(source, tmp_path / "out", "gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"GGUF and no more")
    with pytest.raises(UserError, match=r"llama\.cpp cannot load"):
        llama_cpp.LlamaCpp(tmp_path / FILE)
