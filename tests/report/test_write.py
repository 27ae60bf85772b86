"""The three files of a report: the same figures, nothing from outside, nothing unescaped."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer import Typer
from typer.testing import CliRunner

from nanoworks.cli.report import report_command
from nanoworks.common.errors import UserError
from nanoworks.report import markdown, write_comparison, write_report
from nanoworks.report.blocks import Table
from nanoworks.report.compare import comparison_page
from nanoworks.report.layout import report_page
from nanoworks.report.model import Comparison, Report

MakeRun = Callable[..., Path]


class Document(HTMLParser):
    """Collects what a browser would see: tags, attributes, and the text of table cells and definitions."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.rows: list[list[str]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self.cell = tag in ("td", "th")

    def handle_endtag(self, tag: str) -> None:
        self.cell = False

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.rows and self.cell:
            self.rows[-1][-1] += data


def markdown_rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    cells = [re.split(r"(?<!\\) \| ", line[2:-2]) for line in lines]
    return [[html.unescape(re.sub(r"\\(.)", r"\1", cell)).strip() for cell in row] for row in cells]


@pytest.fixture(scope="module")
def written(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(pipeline, tmp_path_factory.mktemp("report")).parent


def test_the_json_alone_gives_both_other_files(written: Path) -> None:
    """So every figure in report.md and report.html is one of report.json's."""
    report = Report.model_validate_json((written / "report.json").read_text())
    page = report_page(report)
    pictures = {plot.name: path for plot, path in zip(page.plots(), _pictures(written), strict=True)}
    assert markdown.render(page, pictures) == (written / "report.md").read_text()
    shown = Document((written / "report.html").read_text())
    tables = [b for section in page.sections for b in section.blocks if isinstance(b, Table)]
    assert shown.rows == [row for table in tables for row in (table.header, *table.rows)]
    for value, name in page.tiles:
        assert {value, name} <= set(shown.texts)


def _pictures(directory: Path) -> list[str]:
    return re.findall(r"!\[[^]]*\]\((.+?)\)", (directory / "report.md").read_text())


def test_markdown_and_html_have_the_same_tables(written: Path) -> None:
    in_html = Document((written / "report.html").read_text()).rows
    in_markdown = markdown_rows((written / "report.md").read_text())[2:]  # without the tiles
    assert in_markdown == in_html
    assert len(in_html) > 30


def test_figures_are_the_jsons_to_the_digits_shown(written: Path) -> None:
    report = json.loads((written / "report.json").read_text())
    rows = {row[0]: row[1:] for row in Document((written / "report.html").read_text()).rows}
    stages = report["stages"]
    for name, key, part in (
        ("Loss, first", "loss", "first"),
        ("Loss, best", "loss", "best"),
        ("Validation bpb, last", "val_bpb", "last"),
    ):
        assert [float(cell) for cell in rows[name]] == pytest.approx([s[key][part] for s in stages], abs=5e-5)
    assert [int(cell.replace(",", "")) for cell in rows["Steps"]] == [stage["steps"] for stage in stages]
    scores = [e["value"] for stage in stages for e in stage["evals"] if e["task"] == "microworld_facts"]
    shown = [float(cell.split("%")[0]) for cell in rows["microworld_facts"][:4]]
    assert shown == pytest.approx([100 * score for score in scores], abs=0.05)


def test_every_picture_exists_and_stands_alone(written: Path) -> None:
    pictures = _pictures(written)
    assert len(pictures) == len(set(pictures)) > 20
    for picture in pictures:
        svg = (written / picture).read_text()
        assert svg.startswith("<svg")
        assert "prefers-color-scheme" in svg
        assert "#fe00" not in svg


def test_the_page_asks_nothing_of_the_network_and_runs_nothing(written: Path) -> None:
    text = (written / "report.html").read_text()
    document = Document(text)
    assert not document.tags & {"script", "link", "img", "iframe", "object", "form"}
    addresses = [v for n, v in document.attributes if n in ("href", "src", "xlink:href") and not v.startswith("#")]
    assert addresses == []
    assert "url(http" not in text
    assert "@import" not in text


def test_the_same_run_gives_the_same_bytes(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path / "sft", "sft")
    one, two = (write_report(run, tmp_path / name).parent for name in ("one", "two"))
    files = [path.relative_to(one) for path in one.rglob("*.*")]
    assert len(files) > 8
    for file in files:
        assert (one / file).read_bytes() == (two / file).read_bytes(), file


HOSTILE = '</td></pre><script>alert(1)</script><img src=x onerror="alert(2)">|`*_$x$ ```\n</style>&amp;'


def _poisoned(value: Any) -> Any:
    """Put the hostile text into every string of a JSON value, keys included."""
    if isinstance(value, dict):
        return {key: _poisoned(item) for key, item in value.items()} | {HOSTILE: HOSTILE}
    if isinstance(value, list):
        return [_poisoned(item) for item in value]
    return value + HOSTILE if isinstance(value, str) else value


def test_text_of_users_and_models_is_only_ever_text(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path / "sft", "sft")
    for path in (run / "run.json", *run.glob("evals/*/*.json")):
        path.write_text(json.dumps(_poisoned(json.loads(path.read_text()))))
    (run / "config.yaml").write_text(json.dumps({"data": {"train": [HOSTILE, {"name": HOSTILE}]}, HOSTILE: 1}))
    sample = {"step": 1000, "prompt": HOSTILE, "completion": HOSTILE}
    (run / "samples.jsonl").write_text(json.dumps(sample))
    with (run / "metrics.jsonl").open("a") as file:
        for step in (151, 152):
            file.write(json.dumps({"step": step, f"eval/{HOSTILE}": 0.5}) + "\n")
    page = write_report(run)
    document = Document(page.read_text())
    assert not document.tags & {"script", "img"}
    assert not [name for name, _ in document.attributes if name.startswith("on")]
    assert any(text.strip() == HOSTILE.strip() for text in document.texts)
    outside_code = re.sub(r"(?ms)^(`{3,})text\n.*?^\1$", "", (run / "report.md").read_text())
    tags = re.findall(r"<[^>]*>", outside_code)
    assert set(tags) <= {"<details>", "</details>", "<summary>", "</summary>"}
    assert len({line.count(" | ") for line in outside_code.splitlines() if line.startswith("| Loss")}) == 1


def test_a_run_that_has_only_begun_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"name": "new", "stage": "pretrain", "status": "running"}')
    text = write_report(tmp_path).read_text()
    for said in (
        "no metrics yet",
        "No task has been evaluated yet.",
        "No samples were taken.",
        "config.yaml is missing",
    ):
        assert said in text
    json.loads((tmp_path / "report.json").read_text())


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path / "sft", "sft")
    with pytest.raises(UserError, match=r"run\.json.*--out"):
        write_report(run, run / "run.json")


def test_a_comparison_has_the_same_figures_in_all_files(tmp_path: Path, make_run: MakeRun) -> None:
    runs = [make_run(tmp_path / "a", "sft"), make_run(tmp_path / "b", "sft", seed=3, lr=0.002)]
    out = write_comparison(runs, tmp_path / "out").parent
    page = comparison_page(Comparison.model_validate_json((out / "report.json").read_text()))
    rows = Document((out / "report.html").read_text()).rows
    tables = [b for section in page.sections for b in section.blocks if isinstance(b, Table)]
    assert rows == [row for table in tables for row in (table.header, *table.rows)]
    assert rows == markdown_rows((out / "report.md").read_text())[2:]
    assert ["optim.lr", "0.004", "0.002"] in rows
    assert next(row for row in rows if row[0] == "microworld_facts")[3:5] == ["+3.0", "better"]


def test_the_command_writes_beside_the_run_or_where_told(
    tmp_path: Path, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    app = Typer()
    app.command()(report_command)
    a, b = make_run(tmp_path / "a", "sft"), make_run(tmp_path / "b", "sft", seed=1)
    for arguments, place in (
        ([str(a)], a),
        ([str(a), "--out", "elsewhere"], tmp_path / "elsewhere"),
        ([str(a), str(b)], tmp_path / "report"),
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert {"report.html", "report.md", "report.json"} <= {path.name for path in place.iterdir()}
