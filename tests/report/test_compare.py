from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nanoworks.report.collect import collect_stage
from nanoworks.report.compare import compare, comparison_page, judge
from nanoworks.report.model import Comparison, Evaluation

MakeRun = Callable[..., Path]


def _result(value: float | None, stderr: float | None = 0.01, metric: str = "accuracy") -> Evaluation:
    return Evaluation(task="t", metric=metric, value=value, stderr=stderr, step=1)


@pytest.mark.parametrize(
    ("base", "new", "verdict"),
    [
        (_result(0.50), _result(0.53), "better"),  # 0.03 / 0.01414 = 2.12 standard errors
        (_result(0.53), _result(0.50), "worse"),
        (_result(0.50), _result(0.52), "no clear difference"),  # 1.41
        (_result(0.50), _result(0.50), "same"),
        (_result(0.50), _result(0.90, None), None),
        (_result(0.00, 0.0), _result(1.00, 0.0), None),
        (_result(0.50), _result(None), None),
        (_result(0.50), None, None),
        (_result(1.50, metric="bits per byte"), _result(1.40, metric="bits per byte"), "better"),
        (_result(1.40, metric="bits per byte"), _result(1.50, metric="bits per byte"), "worse"),
        (_result(0.50), _result(0.90, metric="bits per byte"), None),
    ],
)
def test_a_verdict_needs_more_than_the_noise(base: Evaluation, new: Evaluation, verdict: str | None) -> None:
    assert judge(new, base)[1] == verdict


def _compared(tmp_path: Path, make_run: MakeRun) -> Comparison:
    runs = [
        make_run(tmp_path / "a", "sft"),
        make_run(tmp_path / "b", "sft", seed=3, lr=0.002),
        make_run(tmp_path / "c", "rl"),
    ]
    return compare([collect_stage(run) for run in runs])


def test_what_differs_is_found(tmp_path: Path, make_run: MakeRun) -> None:
    comparison = _compared(tmp_path, make_run)
    config = {row.key: row.values for row in comparison.config}
    assert config == {
        "stage.name": ["sft", "sft", "rl"],
        "run.seed": [0, 3, 0],
        "train.length": ["150 steps", "150 steps", "60 steps"],
        "optim.lr": [0.004, 0.002, 0.001],
    }
    steps = next(row for row in comparison.figures if row.name == "Steps")
    assert steps.values == [150, 150, 60]
    assert steps.changes == [None, 0.0, pytest.approx(-0.6)]
    facts = next(row for row in comparison.scores if row.task == "microworld_facts")
    assert facts.values == [0.965, 0.995, 0.97]
    assert facts.deltas == [None, pytest.approx(0.03), pytest.approx(0.005)]
    assert facts.verdicts == [None, "better", "no clear difference"]
    assert "different stages" in comparison.notes[0]


def test_curves_of_all_runs_share_a_plot(tmp_path: Path, make_run: MakeRun) -> None:
    page = comparison_page(_compared(tmp_path, make_run))
    plot = next(plot for plot in page.plots() if plot.title == "Loss")
    assert [line.label for line in plot.lines if line.label] == ["a", "b", "c"]  # type: ignore[union-attr]


def test_empty_runs_can_be_compared(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text("{}")
    page = comparison_page(compare([collect_stage(tmp_path / name) for name in ("a", "b")]))
    assert page.plots() == []
