from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from nanoworks.common.errors import UserError
from nanoworks.report.collect import collect, collect_stage
from nanoworks.report.layout import report_page

MakeRun = Callable[..., Path]


def _lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_pipeline_is_followed_back_to_its_first_stage(pipeline: Path) -> None:
    report = collect(pipeline)
    assert [stage.stage for stage in report.stages] == ["pretrain", "midtrain", "sft", "rl"]
    assert report.notes == []
    assert [stage.notes for stage in report.stages] == [[]] * 4
    assert report.total_seconds == pytest.approx(sum(s.elapsed_seconds or 0 for s in report.stages))


def test_figures_are_those_of_the_log(pipeline: Path) -> None:
    stage = collect_stage(pipeline)
    lines = _lines(pipeline)
    steps = [line for line in lines if "train/loss" in line]
    losses = [line["train/loss"] for line in steps]
    assert stage.steps == 60
    assert stage.tokens == steps[-1]["train/tokens"] == 60 * 4096
    assert stage.train_seconds == pytest.approx(sum(line["train/step_seconds"] for line in steps))
    created = json.loads((pipeline / "run.json").read_text())["created"]
    assert stage.elapsed_seconds == pytest.approx(lines[-1]["time"] - created)
    assert stage.tokens_per_second == median(line["train/tokens_per_second"] for line in steps)
    assert stage.mfu == median(line["train/mfu"] for line in steps)
    assert stage.memory_gib == max(line["train/memory_gib"] for line in steps)
    assert stage.loss is not None
    assert (stage.loss.first, stage.loss.last, stage.loss.best) == (losses[0], losses[-1], min(losses))
    assert stage.reward is not None
    assert stage.reward.best == max(line["rl/reward"] for line in steps)
    assert stage.val_bpb is not None
    assert stage.val_bpb.last == [line["val/bpb"] for line in lines if "val/bpb" in line][-1]
    assert {e.task: e.value for e in stage.evals}["microworld_arithmetic"] == 0.955
    assert [sample.step for sample in stage.samples] == [60, 60]


def test_a_folder_is_a_report_of_its_runs_by_age(pipeline: Path) -> None:
    report = collect(pipeline.parent)
    assert report.title == "demo"
    assert [stage.stage for stage in report.stages] == ["pretrain", "midtrain", "sft", "rl"]


def test_a_checkpoint_stands_for_its_run(pipeline: Path) -> None:
    assert collect(pipeline / "step-000060").directory == str(pipeline)


def test_moved_runs_are_found_beside_each_other(tmp_path: Path, make_pipeline: Callable[[Path], Path]) -> None:
    make_pipeline(tmp_path / "before")
    (tmp_path / "before").rename(tmp_path / "after")
    assert len(collect(tmp_path / "after" / "rl").stages) == 4


def test_a_missing_parent_is_said(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path / "sft", "sft", parent="runs/gone/step-000010")
    report = collect(run)
    assert len(report.stages) == 1
    assert "runs/gone/step-000010" in report.notes[0]


def test_parents_that_go_in_circles_end(tmp_path: Path, make_run: MakeRun) -> None:
    make_run(tmp_path / "a", "sft", parent=str(tmp_path / "b"))
    make_run(tmp_path / "b", "rl", parent=str(tmp_path / "a"))
    report = collect(tmp_path / "b")
    assert [stage.name for stage in report.stages] == ["a", "b"]
    assert "its own ancestor" in report.notes[0]


@pytest.mark.parametrize("name", ["nothing", "empty", "file.txt"])
def test_a_path_without_a_run_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").touch()
    with pytest.raises(UserError, match="no run at"):
        collect(tmp_path / name)


def test_a_run_in_progress_says_so(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path / "sft", "sft")
    _edit(run / "run.json", status="running")
    shutil.rmtree(run / "evals")
    (run / "samples.jsonl").unlink()
    log = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(log[: len(log) // 2])
    stage = collect_stage(run)
    assert 0 < stage.steps < 150
    assert stage.evals == []
    assert stage.samples == []
    assert any("not finished" in note for note in stage.notes)
    assert any("1 unreadable line" in note for note in stage.notes)


def test_a_loss_that_was_not_finite_is_said(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path / "sft", "sft")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 151, "time": 1.0, "train/loss": null}\n{"step": 152, "time": 1.0, "train/loss": NaN}\n')
    assert "train/loss was not finite at step 151" in collect_stage(run).notes


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00", b"[1, 2]", b'{"value": "x", "a": [}', b"null"])
@pytest.mark.parametrize(
    "name",
    ["run.json", "config.yaml", "metrics.jsonl", "samples.jsonl", "evals/step-000150/microworld_facts.json"],
)
def test_any_piece_may_be_missing_or_damaged(
    name: str, content: bytes | None, tmp_path: Path, make_run: MakeRun
) -> None:
    run = make_run(tmp_path / "sft", "sft")
    (run / name).unlink()
    if content is not None:
        (run / name).write_bytes(content)
    report = collect(run)
    assert report.stages[0].steps == (0 if name == "metrics.jsonl" else 150)
    if name in ("run.json", "config.yaml"):
        assert any(name in note for note in report.stages[0].notes)


def test_a_recipe_with_keys_that_json_has_not_is_read(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path / "sft", "sft")
    (run / "config.yaml").write_text("1: 2024-01-01\n")
    assert collect_stage(run).config == {"1": "2024-01-01"}


def test_without_figures_of_the_model_its_checkpoint_is_asked(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path / "sft", "sft")
    _edit(run / "run.json", model=None)
    for step, size in ((100, 1), (150, 2)):
        (run / f"step-{step:06d}").mkdir()
        (run / f"step-{step:06d}" / "config.json").write_text(json.dumps({"hidden_size": size}))
    assert collect_stage(run).model == {"hidden_size": 2}


def test_the_newest_evaluation_and_samples_count(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path / "sft", "sft")
    early = run / "evals" / "step-000050" / "microworld_facts.json"
    early.parent.mkdir()
    early.write_text(json.dumps({"task": "microworld_facts", "metric": "accuracy", "value": 0.1, "step": 50}))
    with (run / "samples.jsonl").open("a") as file:
        file.write(json.dumps({"step": 151, "prompt": "p", "completion": "x" * 5000}) + "\n")
    stage = collect_stage(run)
    assert stage.latest_evals()["microworld_facts"].step == 150
    assert len(stage.evals) == 5
    assert [sample.prompt for sample in stage.samples] == ["p"]
    assert stage.samples[0].completion.endswith("x [... 1000 more characters]")


def test_a_task_that_failed_keeps_its_reason(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path / "sft", "sft")
    _edit(run / "evals/step-000150/microworld_facts.json", value=None, stderr=None, n=0, error="out of memory")
    stage = collect_stage(run)
    assert stage.latest_evals()["microworld_facts"].error == "out of memory"
    assert "microworld_facts failed: out of memory" in str(report_page(collect(run)))


def test_scores_that_should_not_be_trusted_are_flagged(tmp_path: Path, make_pipeline: Callable[[Path], Path]) -> None:
    last = make_pipeline(tmp_path / "demo")
    _edit(last / "evals/step-000060/microworld_facts.json", failed=7, settings={"temperature": 1.0})
    shown = str(report_page(collect(last)))
    assert "microworld_facts: 7 of 500 examples could not be run" in shown
    assert "microworld_facts was not run with the same settings" in shown
    assert "microworld_choice was not run" not in shown
