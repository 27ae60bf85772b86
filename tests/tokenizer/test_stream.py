"""Streamed text is the decoded text, and never ends inside a character."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from nanoworks.tokenizer import StreamDecoder, Tokenizer


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=50), st.integers(1, 7))
def test_text(tokenizer: Tokenizer, text: str, chunk: int) -> None:
    ids = tokenizer.encode(text)
    stream = StreamDecoder(tokenizer)
    pushed = [stream.push(ids[start : start + chunk]) for start in range(0, len(ids), chunk)]
    so_far = ""
    for piece in pushed:
        so_far += piece
        assert text.startswith(so_far)
    assert so_far == text
    assert stream.flush() == ""


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 1023), max_size=30))
def test_any_ids(tokenizer: Tokenizer, ids: list[int]) -> None:
    stream = StreamDecoder(tokenizer)
    assert "".join(map(stream.push, ([i] for i in ids))) + stream.flush() == tokenizer.decode(ids)


def test_waits_for_the_last_byte(tokenizer: Tokenizer) -> None:
    stream = StreamDecoder(tokenizer)
    first, second, third, fourth = "🌍".encode()  # a byte's id is its value
    assert [stream.push([i]) for i in (first, second, third, fourth)] == ["", "", "", "🌍"]
    assert stream.push([first, second]) == ""
    assert stream.push([tokenizer.eos_id]) == "\ufffd<|assistant_end|>"
    assert stream.push([first]) == ""
    assert (stream.flush(), stream.flush()) == ("\ufffd", "")
