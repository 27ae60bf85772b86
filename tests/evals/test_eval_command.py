"""`nanoworks eval` on a run's checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from nanoworks.checkpoint import save_checkpoint
from nanoworks.cli.eval import eval_command
from nanoworks.common.errors import UserError
from nanoworks.nn import kernels

app = typer.Typer()
app.command()(eval_command)


@pytest.fixture(scope="module")
def run(learner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "sft"
    step = directory / "step-000020"
    with save_checkpoint(step, learner.model, learner.tokenizer, metadata={"step": 20}):
        pass
    (directory / "run.json").write_text('{"name": "sft"}')
    return directory


def evaluate(run: Path, *arguments: str) -> Result:
    command = [str(run), "--device", "cpu", "--max-tokens", "8", *arguments]
    return CliRunner().invoke(app, command, catch_exceptions=False)


def test_a_table_and_the_files_of_the_run(learner, run):
    names = ",".join(str(learner.directory / f"{name}.yaml") for name in ("colours", "choices"))
    result = evaluate(run, "--tasks", names)
    assert result.exit_code == 0
    assert "colours" in result.stdout
    assert "100.0%" in result.stdout
    written = json.loads((run / "evals" / "step-000020" / "colours.json").read_text())
    assert (written["value"], written["step"]) == (1.0, 20)
    assert len((run / "evals" / "step-000020" / "choices.jsonl").read_text().splitlines()) == 6


def test_rounded_weights_and_cache(learner, run, tmp_path):
    arguments = ["--tasks", str(learner.directory / "colours.yaml"), "--out", str(tmp_path), "--json"]
    arguments += ["--kv-dtype", "int8"] if kernels.available() else []
    for precision in ("int8", "int4"):
        [result] = json.loads(evaluate(run, *arguments, "--quantize", precision).stdout)["results"]
        assert result["value"] == 1.0, f"{precision} lost what the model had learnt by heart"


def test_json_is_all_that_stdout_gets(learner, run, tmp_path):
    (tmp_path / "gsm8k.jsonl").write_text('{"question": "1+1?", "answer": "#### 2"}\n' * 3)
    arguments = ["--tasks", "gsm8k,bpb", "--path", f"gsm8k={tmp_path / 'gsm8k.jsonl'}", "--limit", "2"]
    arguments += ["--option", "gsm8k.split=train", "--option", "bpb.tokens=200", "--samples", "2"]
    arguments += ["--path", f"bpb={learner.directory / 'facts.jsonl'}", "--option", "bpb.sequence_length=16"]
    result = evaluate(run, *arguments, "--temperature", "1", "--out", str(tmp_path / "out"), "--json")
    # facts.jsonl has no field `text`: bpb fails, is reported, and gsm8k is there all the same
    assert result.exit_code == 1
    gsm8k, bpb = json.loads(result.stdout)["results"]
    assert (gsm8k["task"], gsm8k["n"], gsm8k["metric"]) == ("gsm8k", 2, "pass@1")
    assert bpb["value"] is None
    assert "no key 'text'" in bpb["error"]
    assert (tmp_path / "out" / "gsm8k.jsonl").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "gms8k"], "did you mean 'gsm8k'"),
        (["--tasks", "gsm8k", "--path", "test.jsonl"], "not of the form NAME=FILE"),
        (["--tasks", "gsm8k", "--option", "split=train"], "not of the form NAME.KEY=VALUE"),
        (["--tasks", "gsm8k", "--option", "gsm8k.splt=train"], "gsm8k.splt: unknown key"),
        (["--tasks", "gsm8k", "--path", "mmlu=x"], "not evaluated"),
        (["--tasks", "gsm8k", "--samples", "3"], "at temperature 0"),
        (["--tasks", ","], "no task"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(arguments, message):
    with pytest.raises(UserError, match=message):
        evaluate(Path("no-such-checkpoint"), *arguments)


def test_unsafe_reaches_humaneval(run, tmp_path):
    row = {"prompt": "def f(): ", "canonical_solution": "", "entry_point": "f", "test": "def check(f): f()"}
    (tmp_path / "h.jsonl").write_text(json.dumps(row) + "\n")
    result = evaluate(run, "--tasks", "humaneval", "--path", f"humaneval={tmp_path / 'h.jsonl'}", "--unsafe", "--json")
    assert result.exit_code == 0, result.stdout
    assert json.loads(result.stdout)["results"][0]["n"] == 1
