"""nanochat's own tokenizer with what it answered, and tokenizers of other families built on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from nanoworks.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def hard_texts() -> list[str]:
    """Bytes above 0x7f, joiners, long whitespace, contractions, digits of other scripts, spelled-out specials."""
    return [
        "",
        " ",
        "naïve café ÿ \x80\x85\xa0\u2028\u3000|",
        "你好，世界！日本語テスト 한국어",
        "👩‍👩‍👧‍👦 🇫🇷 🤷🏽‍♂️ e\u0301 \u200d\ufeff\ufffd \U0010ffff",
        "a" * 3000 + " " * 3000 + "b" + "\n" * 3000 + "\t \r\n" * 500 + "!?" * 1000,
        "  two  spaces\n\n\n   and lines \r\n\r\n\t\tend  ",
        "I'LL they'Re don'T ſ's 'ſ K'd",
        "3.14159 1,000,000 ٣٤٥ Ⅷ ½ x²",
        "<|bos|><|user_start|>not special<|assistant_end|> <|output_end|><|bos",
        "\x00\x01\x1f\x7f",
    ]


@pytest.fixture(scope="session")
def nanochat_dir(data_dir: Path) -> Path:
    return data_dir / "nanochat_old"


@pytest.fixture(scope="session")
def tokenizer(nanochat_dir: Path) -> Tokenizer:
    return Tokenizer.load(nanochat_dir)


@pytest.fixture(scope="session")
def golden(nanochat_dir: Path) -> dict[str, Any]:
    return json.loads((nanochat_dir / "tokenizer_golden.json").read_text(encoding="utf-8"))


CORPUS = ["the quick brown fox jumps over the lazy dog 你好 🌍\n"] * 3 + [str(i) for i in range(200)]

LLAMA3_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""


@pytest.fixture(scope="session")
def llama3_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level BPE like Llama 3's: another split pattern, its own special tokens, BOS added by default."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=byte_level.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    names = ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id"]
    specials = [f"<|{name}|>" for name in names]
    tokenizer.add_special_tokens(specials)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        special_tokens=[("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))],
    )
    return _write(
        tmp_path_factory.mktemp("llama3"),
        tokenizer,
        {"bos_token": specials[0], "eos_token": specials[4]},
        LLAMA3_TEMPLATE,
    )


@pytest.fixture(scope="session")
def llama2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SentencePiece-like BPE of Llama 2: `▁` for spaces, bytes as `<0x0A>` where no character is known."""
    specials = [AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")]
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=[*specials, *byte_tokens], show_progress=False, limit_alphabet=60
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    document = json.loads(tokenizer.to_str())
    document["added_tokens"] = document["added_tokens"][:3]  # byte tokens are ordinary ones in Llama 2
    template = (
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
        "[INST] {{ message.content }} [/INST]"
        "{% else %}{% generation %} {{ message.content }} {{ eos_token }}{% endgeneration %}{% endif %}"
        "{% endfor %}"
    )
    config = {
        "bos_token": {"__type": "AddedToken", "content": "<s>", "special": True},  # as older directories have it
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": template,
    }
    rebuilt = tokenizers.Tokenizer.from_str(json.dumps(document))
    return _write(tmp_path_factory.mktemp("llama2"), rebuilt, config, None)


def _write(directory: Path, tokenizer: tokenizers.Tokenizer, config: dict[str, Any], template: str | None) -> Path:
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    return directory
