"""Training: both trainers, the same result every time, and sizes that make sense."""

from __future__ import annotations

import pytest

from nanoworks.common.errors import UserError
from nanoworks.tokenizer import SPECIAL_TOKENS, train_tokenizer

TEXTS = [f"the {word} and the {word}s of chapter {i}, 你好\n" for i in range(20) for word in ("fox", "house")]


@pytest.mark.parametrize("trainer", ["rustbpe", "hf"])
def test_trains(trainer: str) -> None:
    tokenizer = train_tokenizer(iter(TEXTS), 300, trainer=trainer)
    assert tokenizer.vocab_size == 300
    assert list(tokenizer.special_tokens.values()) == list(range(291, 300))
    assert tuple(tokenizer.special_tokens) == SPECIAL_TOKENS
    assert tokenizer.decode_bytes(range(256)) == bytes(range(256))
    assert len(tokenizer.encode(" the")) == 1
    assert tokenizer.decode(tokenizer.encode(TEXTS[3])) == TEXTS[3]
    assert train_tokenizer(TEXTS, 300, trainer=trainer).fingerprint == tokenizer.fingerprint


def test_trainers_agree_on_clear_counts() -> None:
    text = ["abcd " * 50, "abc " * 30, "ab " * 20]
    assert train_tokenizer(text, 268).fingerprint == train_tokenizer(text, 268, trainer="hf").fingerprint


def test_numbers_are_cut_after_two_digits() -> None:
    tokenizer = train_tokenizer(["12345 " * 100], 300)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("12345")] == ["12", "34", "5"]


def test_own_pattern() -> None:
    tokenizer = train_tokenizer(["12345"] * 100, 300, pattern=r"\d+|\D+")
    assert len(tokenizer.encode("12345")) == 1


def test_smaller_when_the_text_runs_out() -> None:
    tokenizer = train_tokenizer(["ab"], 1000)
    assert tokenizer.vocab_size == 256 + 1 + 9


@pytest.mark.parametrize("trainer", ["rustbpe", "hf"])
def test_hard_text(trainer: str) -> None:
    tokenizer = train_tokenizer([" " * 1_100_000 + "x", "a\ud800b", ""], 280, trainer=trainer)
    assert len(tokenizer.encode(" " * 64)) < 64


@pytest.mark.parametrize(
    ("texts", "vocab_size", "trainer", "reason"),
    [
        (["a"], 264, "rustbpe", "alone need 265"),
        (["a"], 0, "rustbpe", "vocab_size is 0"),
        ([], 300, "rustbpe", "no text"),
        (["", ""], 300, "hf", "no text"),
        (["a"], 300, "rustbe", r"'rustbe' \(did you mean 'rustbpe'\?\); known: rustbpe, hf"),
    ],
)
def test_refusals(texts: list[str], vocab_size: int, trainer: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        train_tokenizer(texts, vocab_size, trainer=trainer)


def test_failure_while_reading_is_not_swallowed() -> None:
    def texts():  # type: ignore[no-untyped-def]
        yield "a"
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        train_tokenizer(texts(), 300)
