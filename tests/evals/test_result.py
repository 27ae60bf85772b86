from __future__ import annotations

import itertools
import json
import math

import pytest

from nanoworks.evals.result import TaskResult, mean_and_stderr, pass_at_k


def test_mean_and_its_standard_error():
    mean, stderr = mean_and_stderr([1.0, 0.0, 0.0, 1.0])
    assert mean == 0.5
    assert stderr == pytest.approx(math.sqrt(1 / 3) / 2)
    assert mean_and_stderr([1.0]) == (1.0, 0.0)


@pytest.mark.parametrize(("n", "correct"), [(5, 0), (5, 1), (5, 3), (5, 5), (1, 1)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n, correct):
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(range(n), k))
        expected = sum(any(i < correct for i in subset) for subset in subsets) / len(subsets)
        assert pass_at_k(n, correct, k) == pytest.approx(expected)


def test_centered_puts_guessing_at_zero():
    assert TaskResult("t", "multiple_choice", "accuracy", 0.25, baseline=0.25).centered == 0.0
    assert TaskResult("t", "multiple_choice", "accuracy", 1.0, baseline=0.25).centered == 1.0


def test_files_hold_the_figures_and_every_example(tmp_path):
    examples = [{"index": 0, "score": 1.0, "prompt": "é"}, {"index": 1, "score": 0.0}]
    TaskResult("t", "generative", "accuracy", 0.5, 0.5, 2, settings={"seed": 0}, examples=examples).write(
        tmp_path / "evals" / "step-000500", step=500
    )
    summary = json.loads((tmp_path / "evals" / "step-000500" / "t.json").read_text())
    assert summary == {
        "task": "t",
        "kind": "generative",
        "metric": "accuracy",
        "value": 0.5,
        "stderr": 0.5,
        "n": 2,
        "failed": 0,
        "baseline": 0.0,
        "step": 500,
        "settings": {"seed": 0},
        "details": {},
    }
    lines = (tmp_path / "evals" / "step-000500" / "t.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == examples


def test_a_failed_result_is_null_with_its_reason(tmp_path):
    TaskResult("t", "failed", "none", math.nan, error="no data").write(tmp_path)
    text = (tmp_path / "t.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["value"] is None
    assert json.loads(text)["error"] == "no data"
