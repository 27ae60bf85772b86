from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoworks.serve.parts import MARKS, PartSplitter, add_piece

ANSWER = "Multiply: <|python_start|>12*7<|python_end|><|output_start|>84<|output_end|>#### 84"
PARTS = [
    {"type": "text", "text": "Multiply: "},
    {"type": "python", "text": "12*7"},
    {"type": "python_output", "text": "84"},
    {"type": "text", "text": "#### 84"},
]


def split(pieces: list[str]) -> list[dict[str, str]]:
    splitter = PartSplitter()
    parts: list[dict[str, str]] = []
    for piece in [p for text in pieces for p in splitter.feed(text)] + splitter.finish():
        assert piece["text"]
        add_piece(parts, piece)
    return parts


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_the_parts_do_not_depend_on_how_the_text_arrives(size: int) -> None:
    assert split([ANSWER[i : i + size] for i in range(0, len(ANSWER), size)]) == PARTS


def test_what_only_looks_like_a_mark_is_text() -> None:
    text = "a < b, a <| b, <|python_begin|> and at the end <|python_"
    assert split(list(text)) == [{"type": "text", "text": text}]


def test_nothing_is_held_back_without_need() -> None:
    assert PartSplitter().feed("1 < 2") == [{"type": "text", "text": "1 < 2"}]


def test_a_call_that_never_ends_stays_a_call() -> None:
    assert split(["<|python_start|>12*"]) == [{"type": "python", "text": "12*"}]


@given(st.lists(st.sampled_from([*MARKS, "<", "<|", "python_", "x", "|>"]), max_size=20), st.data())
def test_any_text_keeps_all_its_characters(words: list[str], data: st.DataObject) -> None:
    text = "".join(words)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    parts = split(pieces)
    assert parts == split([text])
    without_marks = text
    for mark in MARKS:
        without_marks = without_marks.replace(mark, "\0")
    assert "".join(part["text"] for part in parts) == without_marks.replace("\0", "")
