from __future__ import annotations

import json
import math

import pytest

from nanoworks.common.errors import UserError
from nanoworks.evals import Settings, Suite, TaskResult
from nanoworks.evals.suite import chat_core


def run(learner, names, options=None, **kwargs):
    suite = Suite(names, options)
    return list(suite.run(learner.engine, learner.tokenizer, Settings(max_tokens=8, max_examples=4), **kwargs))


def test_names_of_all_kinds_in_one_run(learner, tmp_path):
    (tmp_path / "text.txt").write_text("grass is green\n" * 40)
    colours, choices = (str(learner.directory / f"{name}.yaml") for name in ("colours", "choices"))
    options = {"bpb": {"path": str(tmp_path / "text.txt"), "sequence_length": 32}, "spelling_bee": {"size": 3}}
    results = run(learner, [colours, "spelling_bee", choices, "bpb"], options, out=tmp_path / "out", step=9)
    assert [(r.task, r.metric, r.n) for r in results[:3]] == [
        ("colours", "accuracy", 4),
        ("spelling_bee", "accuracy", 3),
        ("choices", "accuracy", 4),
    ]
    assert [r.value for r in results[:3]] == [1.0, 0.0, 1.0]
    assert (results[3].task, results[3].metric) == ("bpb", "bits per byte")
    assert results[3].value > 0
    for name in ("colours", "spelling_bee", "choices", "bpb"):
        assert json.loads((tmp_path / "out" / f"{name}.json").read_text())["step"] == 9


def test_one_that_fails_is_recorded_and_the_others_go_on(learner, tmp_path):
    gsm8k = {"path": str(tmp_path / "none.jsonl")}
    colours = str(learner.directory / "colours.yaml")
    results = run(learner, ["gsm8k", colours], {"gsm8k": gsm8k}, out=tmp_path / "out")
    assert math.isnan(results[0].value)
    assert "none.jsonl: no such file" in results[0].error
    assert results[1].value == 1.0
    failed = json.loads((tmp_path / "out" / "gsm8k.json").read_text())
    assert failed["value"] is None
    assert "no such file" in failed["error"]


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["gms8k"], {}, r"unknown evaluation 'gms8k' \(did you mean 'gsm8k'\?\).*bpb.*core"),
        (["gsm8k"], {"gsm8k": {"pth": "x"}}, r"gsm8k.pth: unknown key \(did you mean 'path'\?\)"),
        (["core"], {"core": {"pth": "x"}}, r"core.pth: unknown key"),
        (["bpb"], {"bpb": {"tokens": 0}}, r"bpb.tokens"),
        (["gsm8k"], {"mmlu": {"path": "x"}}, r"options for 'mmlu', which is not evaluated"),
    ],
)
def test_mistakes_are_found_before_anything_runs(names, options, message):
    with pytest.raises(UserError, match=message):
        Suite(names, options)


def test_chat_core_is_the_mean_centered_accuracy():
    results = [
        TaskResult("mmlu", "multiple_choice", "accuracy", 0.625, 0.03, 10, baseline=0.25),
        TaskResult("gsm8k", "generative", "accuracy", 0.1, 0.04, 20),
    ]
    composite = chat_core(results)
    assert composite.value == pytest.approx((0.5 + 0.1) / 2)
    assert composite.stderr == pytest.approx(math.sqrt(0.04**2 + 0.04**2) / 2)
    assert composite.n == 30
    assert composite.details == {"mmlu": pytest.approx(0.5), "gsm8k": pytest.approx(0.1)}


def test_chat_stands_for_nanochats_six_tasks(learner, tmp_path):
    arc = {"question": "Which?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
    code = {"prompt": "def f(): ", "canonical_solution": "pass", "entry_point": "f", "test": "def check(f): f()"}
    rows = {
        "arc_easy": arc,
        "arc_challenge": arc,
        "mmlu": {"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 0},
        "gsm8k": {"question": "1+1?", "answer": "#### 2"},
        "humaneval": code,
    }
    options = {"spelling_bee": {"size": 2}, "humaneval": {"allow_unsandboxed": True}}
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        options.setdefault(name, {})["path"] = str(tmp_path / f"{name}.jsonl")
    results = run(learner, ["chat"], options)
    assert [r.task for r in results] == [
        "arc_easy",
        "arc_challenge",
        "mmlu",
        "gsm8k",
        "humaneval",
        "spelling_bee",
        "chat_core",
    ]
    assert results[-1].value == pytest.approx(sum(r.centered for r in results[:-1]) / 6)
