from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoworks.engine.text import TextStream
from nanoworks.tokenizer import SPLIT_PATTERN, Tokenizer

BYTES = Tokenizer.from_ranks({bytes([i]): i for i in range(256)}, SPLIT_PATTERN)


def pieces(text: str, *stop: str, flush: bool = True) -> list[str]:
    """Push a text byte by byte."""
    stream = TextStream(BYTES, stop)
    out = [stream.push([byte]) for byte in text.encode()]
    return [*out, stream.flush()] if flush else out


def test_a_character_waits_for_its_last_byte() -> None:
    assert pieces("a€b") == ["a", "", "", "€", "b", ""]


def test_an_unfinished_character_becomes_a_replacement_at_the_end() -> None:
    stream = TextStream(BYTES, ())
    assert stream.push("€".encode()[:2]) == ""
    assert stream.flush() == "�"


def test_what_may_begin_a_stop_string_is_held_back_until_it_is_known() -> None:
    assert pieces("ab--c", "---") == ["a", "b", "", "", "--c", ""]
    assert pieces("ab--", "---") == ["a", "b", "", "", "--"]


def test_text_is_cut_before_the_stop_string() -> None:
    stream = TextStream(BYTES, ("END",))
    assert "".join(stream.push([b]) for b in b"the EN the END of it") == "the EN the "
    assert stream.stopped
    assert stream.flush() == ""


def test_a_stop_string_inside_one_push_cuts_it() -> None:
    stream = TextStream(BYTES, ("\n\n", "Q:"))
    assert stream.push(list(b"yes Q: no\n\n")) == "yes "
    assert stream.stopped


@pytest.mark.parametrize("text", ["aaab", "aaaab", "xaab"])
def test_a_stop_string_that_begins_like_itself_is_found(text: str) -> None:
    assert "".join(pieces(text, "aab")) == text[: text.index("aab")]


@given(st.text(alphabet="ab€", max_size=30), st.lists(st.text(alphabet="ab€", min_size=1, max_size=4), max_size=3))
def test_pieces_join_to_the_text_before_the_first_stop(text: str, stop: list[str]) -> None:
    # Which stop string is seen first matters, not which begins first: the shorter one ends the output sooner.
    ends = [text.find(s) + len(s) for s in stop if s in text]
    seen = text[: min(ends)] if ends else text
    cut = min((seen.find(s) for s in stop if s in seen), default=len(seen))
    assert "".join(pieces(text, *stop)) == seen[:cut]


def test_a_stop_string_that_may_not_stop_yet_is_text() -> None:
    stream = TextStream(BYTES, ("END", "N"))
    out = "".join(stream.push([byte], may_stop=i >= 5) for i, byte in enumerate(b"END END"))
    assert (out + stream.flush(), stream.stopped) == ("END E", True)


def test_a_stop_string_that_began_before_it_may_stop_still_counts() -> None:
    stream = TextStream(BYTES, ("END",))
    out = "".join(stream.push([byte], may_stop=i >= 3) for i, byte in enumerate(b"xENDy"))
    assert (out + stream.flush(), stream.stopped) == ("x", True)
