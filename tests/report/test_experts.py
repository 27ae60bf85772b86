"""The use of experts in a report: the mean of the last records, a heat map of it, curves; nothing for a dense run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanoworks.report import write_report
from nanoworks.report.blocks import HeatMap
from nanoworks.report.collect import collect
from nanoworks.report.layout import report_page
from tests.train.test_experts import MODEL


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from nanoworks.train.launch import launch
    from tests.train.tiny import recipe

    return launch(recipe(tmp_path_factory.mktemp("moe"), model=MODEL, moe={"capacity_factor": 0.6})).run


def test_the_heat_map_is_the_mean_of_the_last_records(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "experts.jsonl").read_text().splitlines()]
    use = collect(run).stages[0].experts
    assert use is not None
    assert (use.first_step, use.last_step, use.layers) == (3, 12, [0, 1])
    for layer in (0, 1):
        for expert in range(4):
            mean = sum(row["shares"][layer][expert] for row in rows[-10:]) / 10
            assert use.shares[layer][expert] == pytest.approx(mean, abs=1e-5)
    [heat] = [plot for plot in report_page(collect(run)).plots() if isinstance(plot, HeatMap)]
    assert heat.rows == ["layer 0", "layer 1"]
    assert heat.values[1][2] == pytest.approx(4 * use.shares[1][2])


def test_the_page_shows_the_map_and_the_curves(run: Path, tmp_path: Path) -> None:
    html = write_report(run, tmp_path).read_text()
    for text in ("Use of experts, steps 3 to 12", "Entropy of the use of experts", "Busiest expert", "dropped"):
        assert text in html
    picture = (tmp_path / "report-plots" / "1-pretrain-experts.svg").read_text()
    use = collect(run).stages[0].experts
    assert use is not None
    assert "layer 1" in picture
    assert f">{4 * use.shares[0][3]:.2f}<" in picture
    assert "var(--series-0" in picture


def test_a_large_map_has_no_figures_and_its_records_may_come_twice(run: Path, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text((run / "run.json").read_text())
    rows = [{"step": s, "layers": [0, 2], "shares": [[1 / 64] * 64, [2 / 64] * 32 + [0] * 32]} for s in (1, 2, 2)]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "experts.jsonl").write_text("\n".join([*lines, '{"step": 3, "la']))
    use = collect(tmp_path).stages[0].experts
    assert use is not None
    assert (use.first_step, use.last_step) == (1, 2)
    write_report(tmp_path)
    picture = (tmp_path / "report-plots" / "1-pretrain-experts.svg").read_text()
    assert "layer 2" in picture
    assert ">2.00<" not in picture


@pytest.mark.parametrize("text", ["", "{}", '{"step": 1}', '{"step": 1, "layers": [0], "shares": 3}', "\x00"])
def test_a_damaged_file_is_no_map(run: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text((run / "run.json").read_text())
    (tmp_path / "experts.jsonl").write_text(text)
    assert collect(tmp_path).stages[0].experts is None
    write_report(tmp_path)
