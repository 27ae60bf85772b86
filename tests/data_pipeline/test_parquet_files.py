"""Parquet files, good and bad."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanoworks.common.errors import UserError
from nanoworks.data import Reader, build_source


def write(path, texts, *, column="text", row_group_size=4):
    pq.write_table(pa.table({column: texts, "url": list(range(len(texts)))}), path, row_group_size=row_group_size)


def source(path, **options):
    return build_source("parquet", {"path": str(path), "split": "all", **options})


def test_a_page_is_a_row_group_and_only_that_is_read(tmp_path):
    write(tmp_path / "a.parquet", [f"a{i}" for i in range(10)])
    write(tmp_path / "b.parquet", ["b0"])
    opened = source(tmp_path)
    assert [list(opened.read(page)) for page in range(len(opened))] == [
        ["a0", "a1", "a2", "a3"],
        ["a4", "a5", "a6", "a7"],
        ["a8", "a9"],
        ["b0"],
    ]


def test_a_row_group_larger_than_a_portion_is_read_portion_by_portion(tmp_path):
    write(tmp_path / "a.parquet", [str(i) for i in range(1000)], row_group_size=1000)
    read = iter(source(tmp_path).read(0))
    assert next(read) == "0"
    assert list(read) == [str(i) for i in range(1, 1000)]


def test_the_stored_order_is_kept_unless_asked_otherwise(tmp_path):
    write(tmp_path / "a.parquet", [str(i) for i in range(50)])
    read = [document for _, document in Reader(source(tmp_path), epochs=1)]
    assert read == [str(i) for i in range(50)]
    assert read != [document for _, document in Reader(source(tmp_path, shuffle=True), epochs=1)]


def test_the_last_file_or_a_hash_of_each_document_is_validation(tmp_path):
    for name in "abc":
        write(tmp_path / f"{name}.parquet", [f"{name}{i}" for i in range(100)])
    assert {d[0] for d in source(tmp_path, split="val", validation="last_file")} == {"c"}
    assert {d[0] for d in source(tmp_path, split="train", validation="last_file")} == {"a", "b"}
    train, val = (set(source(tmp_path, split=s, val_fraction=0.2)) for s in ("train", "val"))
    assert len(train | val) == 300
    assert not train & val
    assert 30 < len(val) < 90


def test_missing_values_are_left_out_and_counted(tmp_path):
    write(tmp_path / "a.parquet", ["x", None, "y"])
    assert list(source(tmp_path).read(0)) == ["x", None, "y"]
    assert list(source(tmp_path)) == ["x", "y"]


def test_a_column_of_messages_holds_conversations(tmp_path):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    write(tmp_path / "a.parquet", [messages], column="messages")
    assert list(source(tmp_path, column="messages")) == [{"messages": messages}]
    write(tmp_path / "a.parquet", [[{"role": "robot", "content": "Hi"}]], column="messages")
    with pytest.raises(UserError, match=r"a\.parquet, row group 0, column 'messages': message 0 has no role"):
        list(source(tmp_path, column="messages"))


def test_a_missing_column_is_named_with_the_columns_that_exist(tmp_path):
    write(tmp_path / "a.parquet", ["x"], column="texts")
    with pytest.raises(UserError, match=r"a\.parquet has no column 'text' \(did you mean 'texts'\?\).*texts, url"):
        source(tmp_path)


def test_a_column_of_another_type_is_named_with_the_columns_that_exist(tmp_path):
    write(tmp_path / "a.parquet", ["x"])
    with pytest.raises(UserError, match=r"column 'url' holds int64, neither texts nor messages.*text, url"):
        source(tmp_path, column="url")


def test_a_truncated_file_is_named(tmp_path):
    write(tmp_path / "a.parquet", ["x" * 1000] * 10)
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"a\.parquet is not a whole parquet file.*fetch it again"):
        source(tmp_path)


def test_damage_inside_a_row_group_is_named_with_its_place(tmp_path):
    write(tmp_path / "a.parquet", [f"some text {i}" * 50 for i in range(8)])
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[4:400] = b"\xff" * 396
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.parquet, row group 0, column 'text'"):
        list(source(tmp_path))


def test_an_empty_file_and_a_file_without_rows_are_named(tmp_path):
    (tmp_path / "a.parquet").touch()
    with pytest.raises(UserError, match=r"a\.parquet is empty"):
        source(tmp_path)
    pq.write_table(
        pa.table({"text": pa.array([], pa.string()), "id": pa.array([], pa.int64())}), tmp_path / "a.parquet"
    )
    with pytest.raises(UserError, match=r"a\.parquet has no rows; its columns: text, id"):
        source(tmp_path)
