"""The directory: `AutoTokenizer` reads it with identical ids and chats; damaged files are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoworks.common.errors import UserError
from nanoworks.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanoworks.tokenizer.backends import HuggingFaceBackend, TiktokenBackend


@pytest.fixture(scope="module")
def auto(nanochat_dir: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(nanochat_dir)


def test_save_is_stable(tokenizer: Tokenizer, nanochat_dir: Path, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "new" / "folder")
    names = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert names == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (tmp_path / "new" / "folder" / name).read_bytes() == (nanochat_dir / name).read_bytes()


def test_auto_tokenizer_ids(auto: Any, tokenizer: Tokenizer, hard_texts: list[str]) -> None:
    assert (len(auto), auto.bos_token_id, auto.eos_token_id) == (1024, tokenizer.bos_id, tokenizer.eos_id)
    for text in hard_texts:
        ids = tokenizer.encode(text)
        assert auto.encode(text, split_special_tokens=True) == ids
        if not any(token in text for token in SPECIAL_TOKENS):
            assert auto.encode(text) == ids
            assert auto.decode(ids) == text
    for token, i in tokenizer.special_tokens.items():
        assert auto.convert_tokens_to_ids(token) == i
        assert auto.encode(f"a{token} b") == [*tokenizer.encode("a"), i, *tokenizer.encode(" b")]
        assert auto.decode([i]) == tokenizer.decode([i]) == token


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=100))
def test_auto_tokenizer_any_text(auto: Any, tokenizer: Tokenizer, text: str) -> None:
    assert auto.encode(text, split_special_tokens=True) == tokenizer.encode(text)


def test_auto_tokenizer_chat(auto: Any, tokenizer: Tokenizer, golden: dict[str, Any]) -> None:
    for name, case in golden["conversations"].items():
        if name == "injection":  # a template is text, so there a spelled-out special token is one
            continue
        messages = case["conversation"]["messages"]
        assert auto.apply_chat_template(messages, return_dict=False) == case["ids"], name
        asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        prompt = auto.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        assert prompt == tokenizer.render_for_completion(case["conversation"]), name
    with pytest.raises(Exception, match="roles must be"):
        auto.apply_chat_template([{"role": "assistant", "content": "hello"}])


@pytest.mark.parametrize("model_type", ["llama", "nanochat"])
def test_auto_tokenizer_beside_a_model(
    tokenizer: Tokenizer, tmp_path: Path, model_type: str, hard_texts: list[str]
) -> None:
    """A config.json must not make transformers choose that family's own tokenizer class."""
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 1024}))
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in hard_texts:
        assert auto.encode(text, split_special_tokens=True) == tokenizer.encode(text)


def test_saved_again_by_transformers(auto: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    auto.save_pretrained(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert isinstance(again.backend, TiktokenBackend)
    assert again.fingerprint == tokenizer.fingerprint


def test_older_merge_spelling(nanochat_dir: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    shutil.copytree(nanochat_dir, tmp_path, dirs_exist_ok=True)
    document = json.loads((nanochat_dir / "tokenizer.json").read_text())
    document["model"]["merges"] = [" ".join(pair) for pair in document["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint


def _edit_pattern(document: dict[str, Any]) -> None:
    document["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "MergedWithPrevious"


def _edit_vocabulary(document: dict[str, Any]) -> None:
    vocabulary = document["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def _edit_specials(document: dict[str, Any]) -> None:
    del document["added_tokens"][-1]


def _edit_normalizer(document: dict[str, Any]) -> None:
    document["normalizer"] = {"type": "Lowercase"}


@pytest.mark.parametrize("edit", [_edit_pattern, _edit_vocabulary, _edit_specials, _edit_normalizer])
def test_what_tiktoken_would_encode_otherwise(nanochat_dir: Path, tmp_path: Path, edit: Any) -> None:
    """It is left to the `tokenizers` library, with our files' own template."""
    shutil.copytree(nanochat_dir, tmp_path, dirs_exist_ok=True)
    document = json.loads((nanochat_dir / "tokenizer.json").read_text())
    edit(document)
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    loaded = Tokenizer.load(tmp_path)
    assert isinstance(loaded.backend, HuggingFaceBackend)
    assert loaded.render_for_completion({"messages": [{"role": "user", "content": "hi"}]})[0] == loaded.bos_id


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("tokenizer.json", b'{"model": {"vocab"', "tokenizer.json is damaged"),
        ("tokenizer.json", b"[]", "not a JSON object"),
        ("tokenizer.json", b"{}", "damaged or of an unknown kind"),
        ("tokenizer.json", b"\xff\xfe", "not UTF-8"),
    ],
)
def test_damaged(nanochat_dir: Path, tmp_path: Path, name: str, content: bytes | None, reason: str) -> None:
    shutil.copytree(nanochat_dir, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=reason):
        Tokenizer.load(tmp_path)


def test_pickle_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.pkl").write_bytes(b"")
    with pytest.raises(UserError, match="import_nanochat_tokenizer"):
        Tokenizer.load(tmp_path)
