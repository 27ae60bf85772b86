"""The interpreter's standard library as text."""

from __future__ import annotations

import pytest

from nanoworks.common.errors import UserError
from nanoworks.data import build_source


@pytest.fixture
def library(tmp_path):
    for number in range(40):
        (tmp_path / f"module_{number}.py").write_text(f"# module {number}\n\nx = {number}\n")
    for left_out in ("test/test_a.py", "site-packages/b.py", "pkg/tests/c.py"):
        (tmp_path / left_out).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / left_out).write_text("# left out\n")
    (tmp_path / "latin.py").write_bytes("# -*- coding: latin-1 -*-\n# caf\xe9\n".encode("latin-1"))
    return tmp_path


def test_every_file_but_the_tests_is_on_one_side_of_the_split(library):
    train, val, everything = (
        list(build_source("stdlib", {"path": str(library), "split": split, "val_fraction": 0.25}))
        for split in ("train", "val", "all")
    )
    assert sorted(train + val) == sorted(everything)
    assert len(everything) == 41
    assert 3 < len(val) < 20
    assert not any("left out" in text for text in everything)
    assert any("café" in text for text in everything)


def test_the_order_is_the_same_on_every_machine(library):
    first, again = (list(build_source("stdlib", {"path": str(library)})) for _ in range(2))
    assert first == again
    numbers = [text.split()[2] for text in first if "module" in text]
    assert numbers == sorted(numbers)


def test_the_running_interpreter_has_one():
    source = build_source("stdlib", {"split": "val", "document_chars": 2000})
    documents = list(source)
    assert sum(map(len, documents)) > 100_000
    assert max(map(len, documents)) <= 2000


def test_a_folder_without_python_files_names_the_alternatives(tmp_path):
    with pytest.raises(UserError, match=r"no Python files .*microworld, text or parquet"):
        build_source("stdlib", {"path": str(tmp_path)})
