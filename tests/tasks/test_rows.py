"""Reading rows: formats, order, and what is said of bad files and of a hub out of reach."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanoworks.common.errors import UserError
from nanoworks.tasks.rows import HubFiles, load_rows
from tests.tasks.conftest import GSM8K, write_jsonl, write_parquet

ROWS = [{"question": f"q{i}", "answer": i} for i in range(50)]


def test_parquet_jsonl_and_gz_hold_the_same_rows(tmp_path):
    paths = [
        write_parquet(tmp_path / "a" / "rows.parquet", ROWS),
        str(tmp_path / "a"),
        write_jsonl(tmp_path / "rows.jsonl", ROWS),
        write_jsonl(tmp_path / "rows.jsonl.gz", ROWS),
    ]
    for path in paths:
        rows = load_rows(path, None, ("question", "answer"), shuffle=False)
        assert [rows[i] for i in range(len(rows))] == ROWS


def test_order_is_that_of_datasets_shuffle_seed_42(tmp_path):
    # datasets.Dataset.shuffle(seed) selects np.random.default_rng(seed).permutation(len)
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    rows = load_rows(path, None, ("question",), limit=7)
    expected = np.random.default_rng(42).permutation(50)[:7]
    assert [rows[i]["answer"] for i in range(len(rows))] == expected.tolist()
    assert rows.where(0) == f"{path}:{expected[0] + 1}"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"question": 1, "answer": 2}\n{"question": 1}\n', r"x.jsonl:2: no field 'answer'"),
        ("x.jsonl", b'{"question": 1, "answer": 2}\n\n{"question', r"x.jsonl:3: not JSON"),
        ("x.jsonl", b'{"question": "\xff"}\n', r"x.jsonl:1: not UTF-8"),
        ("x.jsonl", b"[1, 2]\n", r"x.jsonl:1: a row is an object"),
        ("x.jsonl", b"\n\n", r"no rows"),
        ("x.jsonl.gz", b"not gzip", r"cannot be read"),
        ("x.csv", b"question,answer\n", r"cannot read this kind of file"),
        ("x.parquet", b"PAR1 and then nothing", r"not a readable Parquet file"),
    ],
)
def test_bad_files_are_refused_by_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_rows(str(path), None, ("question", "answer"))


def test_bad_parquet_is_refused_by_name(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", [{"qestion": 1, "answer": 2}])
    with pytest.raises(UserError, match=r"x.parquet: no column 'question' \(did you mean 'qestion'\?\)"):
        load_rows(path, None, ("question", "answer"))
    pq.write_table(pa.table({"question": pa.array([], pa.string())}), path)
    with pytest.raises(UserError, match="no rows"):
        load_rows(path, None, ("question",))
    data = Path(write_parquet(tmp_path / "y.parquet", ROWS)).read_bytes()
    (tmp_path / "y.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"y.parquet: not a readable Parquet file"):
        load_rows(str(tmp_path / "y.parquet"), None, ("question",))
    with pytest.raises(UserError, match="no such file"):
        load_rows(str(tmp_path / "z.parquet"), None, ("question",))


def test_without_the_hub_extra_its_install_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'nanoworks\[hub\]'"):
        load_rows(None, HubFiles("owner/set", "*.parquet"), ())


def test_from_the_hub_only_the_split_is_read_and_offline_is_explained(tmp_path):
    # the hub's own cache layout, and its own switch for working without a network
    snapshot = tmp_path / "hub" / "datasets--openai--gsm8k" / "snapshots" / "0123"
    write_parquet(snapshot / "main" / "test-00000-of-00002.parquet", GSM8K[:1])
    write_parquet(snapshot / "main" / "test-00001-of-00002.parquet", GSM8K[1:])
    write_parquet(snapshot / "main" / "train-00000-of-00001.parquet", GSM8K * 5)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123")
    program = """
from nanoworks.common.errors import UserError
from nanoworks.tasks import build_task
print(len(build_task("gsm8k")), len(build_task("gsm8k", {"split": "train"})))
try:
    build_task("mmlu")
except UserError as error:
    print(error)
"""
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lengths, message = done.stdout.strip().split("\n", 1)
    assert lengths == "2 10"
    assert "cais/mmlu" in message
    assert "path=FILE" in message
