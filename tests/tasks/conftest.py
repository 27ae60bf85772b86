"""Small local files in the layout of each benchmark's official data."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ARC = [
    {
        "id": "one",
        "question": "Which one melts?",
        "choices": {"text": ["ice", "stone", "sand"], "label": ["A", "B", "C"]},
        "answerKey": "A",
    },
    {
        "id": "two",
        "question": "Which one flies?",
        "choices": {"text": ["a cow", "a crow"], "label": ["1", "2"]},
        "answerKey": "2",
    },
]
MMLU = [
    {"question": f"What is {i} + 1?", "choices": [str(i), str(i + 1), str(i + 2), "none"], "answer": 1, "subject": "x"}
    for i in range(12)
]
GSM8K = [
    {"question": "Two pens cost $4 each. Total?", "answer": "They cost 2*4 = $<<2*4=8>>8.\n#### 8"},
    {"question": "A farm of 1,200 cows and 34 more?", "answer": "<<1200+34=1234>>1234 cows.\n#### 1,234"},
]
HUMANEVAL = [
    {
        "task_id": "HumanEval/0",
        "prompt": 'import math\n\n\ndef half(n):\n    """Half of n, rounded up.\n    """\n',
        "canonical_solution": "    return math.ceil(n / 2)\n",
        "entry_point": "half",
        "test": "\ndef check(candidate):\n    assert candidate(3) == 2\n    assert candidate(4) == 2\n",
    }
]
TALK = [
    {"messages": [{"role": "user", "content": f"hi {i}"}, {"role": "assistant", "content": f"hello {i}"}]}
    for i in range(5)
]


def write_jsonl(path: Path, rows: Iterable[Any]) -> str:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> Callable[[str], str]:
    """`files(name)` is the path of a small data file of that task."""
    written = {
        "arc_easy": lambda: write_parquet(tmp_path / "arc.parquet", ARC),
        "arc_challenge": lambda: write_jsonl(tmp_path / "arc.jsonl", ARC),
        "mmlu": lambda: write_parquet(tmp_path / "mmlu.parquet", MMLU),
        "gsm8k": lambda: write_jsonl(tmp_path / "gsm8k.jsonl", GSM8K),
        "humaneval": lambda: write_jsonl(tmp_path / "humaneval.jsonl.gz", HUMANEVAL),
        "smoltalk": lambda: write_parquet(tmp_path / "talk.parquet", TALK),
        "conversations": lambda: write_jsonl(tmp_path / "talk.jsonl", [row["messages"] for row in TALK]),
        "simple_spelling": lambda: None,
        "spelling_bee": lambda: None,
    }
    return lambda name: written[name]()
