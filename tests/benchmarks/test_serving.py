"""The serving benchmark's own arithmetic: ratios within a round, the best peer, the goals, the page they go to."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _benchmark_on_path(monkeypatch):
    """Its modules import one another by plain names; none of them stays imported for other tests."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "serving"))
    yield
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if "/benchmarks/serving/" in file:
            del sys.modules[name]


def _record(**changes):
    from results import Record

    rounds = [
        {"nanoworks": 90.0, "vllm": 100.0, "llama.cpp": 80.0},
        {"nanoworks": 12.0, "vllm": 10.0, "llama.cpp": 8.0},
    ]
    rounds.append({"nanoworks": 120.0, "vllm": 100.0, "llama.cpp": 99.0})
    given = {"size": "120m", "precision": "bf16", "row": "decode", "threads": 2, "bandwidth": [40.0, 4.0, 40.0]}
    return Record(**(given | {"engines": ["nanoworks", "vllm", "llama.cpp"], "rounds": rounds} | changes))


def test_a_ratio_is_taken_within_a_round():
    # The second round was slow for all; medians of the rates alone would give 90 / 100.
    assert _record().ratio("vllm") == 1.2


def test_a_goal_is_judged_by_the_best_peer():
    import tables

    record = _record()
    assert tables.best_peer(record) == "vllm"
    [line] = [line for line in tables.goals([record]).splitlines() if "decode" in line]
    assert line == "| 120m | decode, batch 1, bf16 | 90 | vllm | 100 | **1.20** | 3 | 1.1 |"
    assert tables.worst([record, _record(row="prefill")]) == [("120m", "bf16", "decode"), ("120m", "bf16", "prefill")]


def test_records_survive_the_disk_and_the_newest_counts(tmp_path, monkeypatch):
    import results

    monkeypatch.setattr(results, "FILE", tmp_path / "results" / "serving.json")
    assert results.read() == []
    old, new = _record(), _record(engines=["nanoworks", "vllm"], threads=1)
    results.write([old, new])
    assert results.read() == [old, new]
    assert results.newest([old, new], "120m", "bf16", "decode") == new
    assert results.newest([old, new], "120m", "bf16", "decode", "llama.cpp") == old
    assert results.newest([old, new], "120m", "int8", "decode") is None


def test_the_tables_replace_what_is_between_the_markers(tmp_path, monkeypatch):
    import tables

    page = (ROOT / "docs" / "performance.md").read_text()
    monkeypatch.setattr(tables, "DOCS", tmp_path / "page.md")
    tables.DOCS.write_text(page)
    for _ in range(2):
        tables.write_docs("| a table |")
        written = tables.DOCS.read_text()
        assert written.count("| a table |") == 1
        assert written.split(tables.BEGIN)[0] == page.split(tables.BEGIN)[0]
        assert written.split(tables.END)[1] == page.split(tables.END)[1]


def test_the_workload_is_what_the_docs_say():
    import workload

    assert [sum(column) for column in zip(*workload.MIXED, strict=True)] == [2039, 1129]
    # 12 layers of q, o (768 x 768), k, v (256 x 768), three of 768 x 2048, and the last matrix.
    layer = 2 * 768 * 768 + 2 * 256 * 768 + 3 * 768 * 2048
    assert workload.weights("120m") == 12 * layer + 32000 * 768
