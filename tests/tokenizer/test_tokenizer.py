"""Encoding and decoding: nanochat's ids, every text back as it was, specials never from text."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoworks.common.errors import UserError
from nanoworks.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

any_text = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=200)


def test_golden(tokenizer: Tokenizer, golden: dict[str, Any]) -> None:
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (golden["vocab_size"], golden["bos"])
    assert tokenizer.special_tokens == golden["special"]
    assert tokenizer.backend.rules == golden["pat_str"] == SPLIT_PATTERN
    for case in golden["encode"]:
        assert tokenizer.encode(case["text"]) == case["ids"]
        assert tokenizer.decode(case["ids"]) == case["decode"]
    for case in golden["decode_partial_utf8"]:
        assert tokenizer.decode(case["ids"]) == case["decode"]
        assert tokenizer.decode_bytes(case["ids"]) == bytes(case["bytes"])
    tokens = b"\0".join(tokenizer.decode_bytes([i]) for i in range(1024 - len(SPECIAL_TOKENS)))
    assert hashlib.sha256(tokens).hexdigest() == golden["token_bytes_hex_sha256"]


def test_token_bytes_are_raw(tokenizer: Tokenizer, golden: dict[str, Any]) -> None:
    assert tokenizer.token_bytes() == golden["token_bytes"]
    assert tokenizer.token_bytes()[0x80:0x100] == [1] * 128
    assert tokenizer.token_bytes()[-9:] == [0] * 9


def test_ids_of_turns(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_id == tokenizer.special_tokens["<|assistant_end|>"]
    assert tokenizer.stop_ids == (tokenizer.eos_id, tokenizer.bos_id)


def test_batch(tokenizer: Tokenizer, hard_texts: list[str]) -> None:
    one_by_one = [tokenizer.encode(text, bos=True) for text in hard_texts]
    assert all(ids[0] == tokenizer.bos_id for ids in one_by_one)
    for threads in (1, 3):
        assert tokenizer.encode_batch(hard_texts, bos=True, threads=threads) == one_by_one


@settings(max_examples=150, deadline=None)
@given(any_text)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert sum(tokenizer.token_bytes()[i] for i in ids) == len(text.encode())


def test_special_text_stays_text(tokenizer: Tokenizer) -> None:
    for token in SPECIAL_TOKENS:
        ids = tokenizer.encode(f"a{token}b")
        assert not set(ids) & set(tokenizer.special_tokens.values())
        assert tokenizer.decode(ids) == f"a{token}b"


@pytest.mark.parametrize("text", [" " * 1_200_000 + "x", "\t " * 600_000, "\n" * 1_200_000, "a" * 1_200_000])
def test_very_long(tokenizer: Tokenizer, text: str) -> None:
    """tiktoken alone panics at a million spaces."""
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_lone_surrogate(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


@pytest.mark.parametrize("unknown", [1024, -1])
def test_unknown_id(tokenizer: Tokenizer, unknown: int) -> None:
    for decode in (tokenizer.decode, tokenizer.decode_bytes):
        with pytest.raises(UserError, match=f"token id {unknown} is not in this tokenizer's vocabulary of 1024"):
            decode([65, unknown])


def test_fingerprint(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint
    ranks = {bytes([byte]): byte for byte in range(256)}
    others = [
        Tokenizer.from_ranks({**ranks, **more}, pattern).fingerprint
        for more, pattern in [({}, SPLIT_PATTERN), ({b"ab": 256}, SPLIT_PATTERN), ({}, r"[\s\S]")]
    ]
    assert len({tokenizer.fingerprint, *others}) == 4


@pytest.mark.parametrize("era", ["old", "new"])
def test_full_golden(shared_dir: Path, era: str) -> None:
    from nanoworks.tokenizer.nanochat import import_nanochat_tokenizer

    folder = shared_dir / "golden" / "nanochat" / era
    golden = json.loads((folder / "golden.json").read_text())
    tokenizer = import_nanochat_tokenizer(folder / "base" / "tokenizer")
    test_golden(tokenizer, golden["tokenizer"])
    texts = [case["text"] for case in golden["tokenizer"]["encode"]]
    for text, ids in zip(texts, golden["tokenizer"]["encode_prepend_bos_append_assistant_end"], strict=False):
        assert [*tokenizer.encode(text, bos=True), tokenizer.eos_id] == ids
    written, raw = golden["token_bytes"]["values"], tokenizer.token_bytes()
    if era == "new":
        assert raw == written
    else:  # only the lone bytes it counted as 3 differ
        assert {(ours, theirs) for ours, theirs in zip(raw, written, strict=True) if ours != theirs} == {(1, 3)}


def test_import_is_light() -> None:
    code = "import sys, nanoworks.tokenizer; print({'torch', 'jinja2', 'transformers'} & sys.modules.keys())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
