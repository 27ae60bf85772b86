"""Ranks and merges are two spellings of one vocabulary: both encoders give the same ids for any text."""

from __future__ import annotations

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoworks.common.errors import UserError
from nanoworks.tokenizer import SPLIT_PATTERN, Tokenizer, train_tokenizer
from nanoworks.tokenizer.bpe import (
    bytes_to_chars,
    chars_to_bytes,
    merges_from_ranks,
    ranks_from_merges,
)

BYTES = {bytes([byte]): byte for byte in range(256)}
WHOLE_TEXT = r"[\s\S]+"  # one piece, so that merges meet in every way

repetitive = st.text(alphabet="ab", max_size=60) | st.text(alphabet="aé \n'", max_size=30)
any_text = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40)


def hugging_face(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(tokenizer.backend.files["tokenizer.json"])


def test_alphabet() -> None:
    every = bytes(range(256))
    assert chars_to_bytes(bytes_to_chars(every)) == every
    assert bytes_to_chars(b"A\n\xff \xad") == "AĊÿĠŃ"  # GPT-2's characters for these


@settings(max_examples=60, deadline=None)
@given(st.lists(repetitive | any_text, min_size=1, max_size=6), st.integers(0, 40), st.data())
def test_trained_vocabulary(texts: list[str], merges: int, data: st.DataObject) -> None:
    tokenizer = train_tokenizer(["a", *texts], 265 + merges)
    reference = hugging_face(tokenizer)
    for text in [*texts, data.draw(repetitive), data.draw(any_text)]:
        # Both read "<|bos|>" in a text differently, and random text never holds it.
        assert reference.encode(text).ids == tokenizer.encode(text)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_vocabulary_that_converts(data: st.DataObject) -> None:
    """Also vocabularies no training gives: either refused, or exact."""
    ranks = dict(BYTES)
    tokens = [b"a", b"b"]
    for _ in range(data.draw(st.integers(1, 8))):
        token = data.draw(st.sampled_from(tokens)) + data.draw(st.sampled_from(tokens))
        if token not in ranks:
            ranks[token] = len(ranks)
            tokens.append(token)
    try:
        merges = merges_from_ranks(ranks)
    except UserError:
        return
    assert ranks_from_merges(merges) == ranks
    tokenizer = Tokenizer.from_ranks(ranks, WHOLE_TEXT)
    reference = hugging_face(tokenizer)
    for text in data.draw(st.lists(st.text(alphabet="ab", min_size=1, max_size=40), min_size=5, max_size=10)):
        assert reference.encode(text).ids == tokenizer.encode(text)


def test_canonical_merge() -> None:
    """`abc` is a|bc when bc merges first, although ab|c has the same bytes."""
    ranks = {**BYTES, b"bc": 256, b"ab": 257, b"abc": 258}
    assert merges_from_ranks(ranks) == [(b"b", b"c"), (b"a", b"b"), (b"a", b"bc")]


@pytest.mark.parametrize(
    ("ranks", "reason"),
    [
        ({**BYTES, b"ab": 300}, "not 0, 1, 2"),
        ({token: rank for token, rank in BYTES.items() if rank < 255}, "not the single bytes"),
        ({**BYTES, b"\x00": 1, b"\x01": 0}, "not the single bytes"),
        ({**BYTES, b"abc": 256}, "cannot be built"),
    ],
)
def test_refusals(ranks: dict[bytes, int], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        merges_from_ranks(ranks)


def test_two_merges_of_one_token() -> None:
    with pytest.raises(UserError, match="two merges"):
        ranks_from_merges([(b"b", b"c"), (b"a", b"b"), (b"a", b"bc"), (b"ab", b"c")])


def test_file_holds_pattern_and_merges(tokenizer: Tokenizer) -> None:
    document = json.loads(tokenizer.backend.files["tokenizer.json"])
    assert document["pre_tokenizer"]["pretokenizers"][0]["pattern"] == {"Regex": SPLIT_PATTERN}
    assert len(document["model"]["merges"]) == 1024 - 9 - 256
