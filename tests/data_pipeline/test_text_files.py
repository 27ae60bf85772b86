"""Text and JSON Lines files: blocks, records, splits, and bytes that are no text."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanoworks.common.errors import UserError
from nanoworks.data import build_source, records

quiet = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
lines = st.lists(st.text(st.sampled_from("ab é🙂-\t"), max_size=12), max_size=30)


def texts(name, path, **options):
    source = build_source(name, {"path": str(path), "split": "all", "shuffle": False, **options})
    return [document for page in range(len(source)) for document in source.read(page)]


@quiet
@given(lines=lines, block=st.integers(1, 40), end=st.sampled_from(["", "\n"]))
def test_a_json_line_is_read_once_whatever_the_blocks(tmp_path, monkeypatch, lines, block, end):
    monkeypatch.setattr(records, "BLOCK", block)
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": line}, ensure_ascii=False) for line in lines) + end)
    if path.stat().st_size:
        assert texts("jsonl", path) == lines


@quiet
@given(lines=lines, block=st.integers(1, 40))
def test_a_text_without_separator_is_read_whole_whatever_the_blocks(tmp_path, monkeypatch, lines, block):
    monkeypatch.setattr(records, "BLOCK", block)
    path = tmp_path / "a.txt"
    path.write_text("\n".join(lines))
    if path.stat().st_size:
        assert "".join(texts("text", path, document_chars=7)) == "\n".join(lines)


@quiet
@given(lines=lines, block=st.integers(1, 40), separator=st.sampled_from(["", "--", "a"]))
def test_a_document_between_separators_is_read_once_whatever_the_blocks(tmp_path, monkeypatch, lines, block, separator):
    monkeypatch.setattr(records, "BLOCK", block)
    path = tmp_path / "a.txt"
    path.write_text("\n".join(lines))
    documents, current = [], []
    for line in [*lines, separator]:
        if line.rstrip("\t ") == separator:
            documents.append("\n".join(current).strip("\n"))
            current = []
        else:
            current.append(line)
    if path.stat().st_size:
        expected = [document for document in documents if document]
        assert texts("text", path, separator=separator, document_chars=None) == expected


def test_a_long_text_is_cut_where_a_reader_would(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one two\nthree\n\nfour five six\nseven " + "x" * 40)
    pieces = texts("text", path, document_chars=20)
    assert pieces == ["one two\nthree\n\n", "four five six\n", "seven xxxxxxxxxxxxxx", "x" * 20, "x" * 6]


@pytest.mark.parametrize("name", ["text", "jsonl"])
def test_train_and_validation_share_no_document_not_even_an_equal_one(tmp_path, name):
    documents = [f"document {i % 300}" for i in range(600)]
    (tmp_path / "a.txt").write_text("\n\n".join(documents))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": d}) for d in documents))
    options = {"val_fraction": 0.2, **({"separator": ""} if name == "text" else {})}
    train, val = (texts(name, tmp_path, split=split, **options) for split in ("train", "val"))
    assert len(train) + len(val) == 600
    assert not set(train) & set(val)
    assert 60 < len(val) < 180


def test_a_folder_is_read_with_its_subfolders_and_its_last_file_may_be_validation(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.txt", "sub/b.txt", "z.md"):
        (tmp_path / name).write_text(name)
    (tmp_path / "c.csv").write_text("not text")
    assert texts("text", tmp_path) == ["a.txt", "sub/b.txt", "z.md"]
    assert texts("text", tmp_path, split="val", validation="last_file") == ["z.md"]
    assert texts("text", tmp_path, split="train", validation="last_file") == ["a.txt", "sub/b.txt"]
    assert texts("text", str(tmp_path / "*.txt")) == ["a.txt"]
    with pytest.raises(UserError, match="at least two files"):
        texts("text", tmp_path / "a.txt", split="val", validation="last_file")


@pytest.mark.parametrize("path", ["nowhere", "*.nothing", "empty_folder"])
def test_a_path_without_data_is_named(tmp_path, path):
    (tmp_path / "empty_folder").mkdir()
    with pytest.raises(UserError, match="there is no data at"):
        texts("text", tmp_path / path)


def test_an_empty_file_is_an_error(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match="every file is empty"):
        texts("text", tmp_path)


def test_bytes_that_are_not_utf8_are_named_with_their_place_replaced_or_skipped(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"first\n--\ncaf\xe9\n--\nlast\n")
    with pytest.raises(UserError, match=r"a\.txt: not UTF-8 at byte 12; .*errors: replace or errors: skip"):
        texts("text", path, separator="--")
    assert texts("text", path, separator="--", errors="replace") == ["first", "caf�", "last"]
    assert texts("text", path, separator="--", errors="skip") == ["first", None, "last"]


def test_skipping_leaves_out_the_piece_with_the_bad_byte_not_the_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n" * 100 + b"\xff\n" + b"two\n" * 100)
    read = texts("text", path, errors="skip", document_chars=40)
    assert read.count(None) == 1
    assert "".join(filter(None, read)).count("o") > 180


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hello"}\n')
    assert texts("text", tmp_path) == texts("jsonl", tmp_path) == ["hello"]


def test_json_lines_hold_conversations_in_both_forms(tmp_path):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n\n" + json.dumps(messages) + "\n")
    assert texts("jsonl", path) == [{"messages": messages}] * 2


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": ', "not JSON"),
        ('{"body": "x"}', r"no key 'text'; the line has body"),
        ('{"texts": "x"}', r"no key 'text' \(did you mean 'texts'\?\)"),
        ('{"text": 5}', "'text' is not a text but int"),
        ('"x"', "neither an object nor a list"),
        ('{"messages": []}', "messages is not a list with at least one"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "message 0 has no role among"),
        ('{"messages": [{"role": "user", "content": 5}]}', "the content of message 0"),
        ('{"messages": [{"role": "user"}]}', "the content of message 0"),
    ],
)
def test_a_bad_line_is_named_with_file_and_line_or_skipped(tmp_path, monkeypatch, line, reason):
    monkeypatch.setattr(records, "BLOCK", 32)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' * 5 + line + '\n{"text": "last"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:6: " + reason):
        texts("jsonl", path)
    assert texts("jsonl", path, errors="skip") == ["good"] * 5 + [None, "last"]


def test_a_line_that_is_not_utf8_is_named_with_its_byte(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "ok"}\n{"text": "\xff"}\n')
    with pytest.raises(UserError, match="not UTF-8 at byte 25"):
        texts("jsonl", path)
    assert texts("jsonl", path, errors="replace") == ["ok", "�"]
    assert texts("jsonl", path, errors="skip") == ["ok", None]
