"""`nanoworks tokenizer train` and `eval`, as a person calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from nanoworks.cli.tokenizer import app
from nanoworks.common.errors import UserError
from nanoworks.tokenizer import Tokenizer

TEXT = "the quick brown fox jumps over the lazy dog\n" * 50


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """The same text three times: plain, JSON lines (a conversation among them) and parquet."""
    text, lines, table = (tmp_path / name for name in ("a.txt", "b.jsonl", "c.parquet"))
    text.write_text(TEXT)
    chat = {"messages": [{"role": "user", "content": " zebra" * 400}, {"role": "assistant", "content": TEXT}]}
    lines.write_text(json.dumps({"text": TEXT}) + "\n" + json.dumps(chat) + "\n")
    pq.write_table(pa.table({"text": [TEXT, TEXT]}), table)
    return [str(text), str(lines), str(table)]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("trainer", ["rustbpe", "hf"])
def test_train_and_eval(files: list[str], tmp_path: Path, trainer: str) -> None:
    out = tmp_path / "tokenizer"
    output = run("train", *files, "--out", str(out), "--vocab-size", "301", "--trainer", trainer)
    assert "301 tokens from" in output
    tokenizer = Tokenizer.load(out)
    assert [len(tokenizer.encode(word)) for word in (" quick", " zebra")] == [1, 1]
    output = run("eval", str(out), "--against", str(out))
    row = next(line for line in output.splitlines() if "non-Latin" in line)
    figures = [float(cell) for cell in row.split("│")[2:4]]
    assert figures[0] == figures[1]
    assert 1 <= figures[0] < 1.5


def test_limits(files: list[str], tmp_path: Path) -> None:
    output = run("train", files[0], "--out", str(tmp_path / "a"), "--max-chars", "20")
    assert "from 20 characters" in output
    assert "ran out of pairs" in output
    output = run("train", files[1], "--out", str(tmp_path / "b"), "--document-chars", "10")
    assert "from 30 characters" in output  # a text and two messages


def test_source_by_name(tmp_path: Path) -> None:
    output = run("train", "stdlib", "--out", str(tmp_path / "a"), "--vocab-size", "400", "--max-chars", "50000")
    assert "400 tokens from 50" in output


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.txt"):
        run("train", str(tmp_path / "gone.txt"), "--out", str(tmp_path / "a"))
