"""The benchmark of HTTP against no HTTP: its table, and the place of it in docs/performance.md."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def over_http(monkeypatch):
    """Its modules import one another by plain names; none of them stays imported for other tests."""
    before, path = set(sys.modules), list(sys.path)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "serving"))
    import over_http

    yield over_http
    sys.path[:] = path
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if "/benchmarks/serving/" in file or file.endswith("/scripts/peers.py"):
            del sys.modules[name]


def test_a_goal_that_is_held_is_bold(over_http):
    rows = [
        over_http.Row("1.1b", "64 at once", 0.97, "at least 0.95", True, "97 against 100 tokens/s"),
        over_http.Row("1.1b", "start to /ready, s", 12.0, "under 10", False, ""),
    ]
    lines = over_http.table(rows, "int8").splitlines()
    assert lines[2] == "| 1.1b, int8 | 64 at once | **0.97** | at least 0.95 | 97 against 100 tokens/s |"
    assert lines[3] == "| 1.1b, int8 | start to /ready, s | 12.00 | under 10 |  |"


def test_writes_between_its_markers_and_nothing_else(over_http, monkeypatch, tmp_path):
    page = (ROOT / "docs" / "performance.md").read_text()
    copy = tmp_path / "performance.md"
    copy.write_text(page)
    monkeypatch.setattr(over_http, "DOCS", copy)
    over_http.write_docs("| first |")
    over_http.write_docs("| second |")
    written = copy.read_text()
    assert "| second |" in written
    assert "| first |" not in written
    for text in (page, written):
        assert text.count(over_http.BEGIN) == text.count(over_http.END) == 1
    assert written.partition(over_http.BEGIN)[0] == page.partition(over_http.BEGIN)[0]
    assert written.partition(over_http.END)[2] == page.partition(over_http.END)[2]
