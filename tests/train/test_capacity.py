"""The sweep over capacity factors: no capacity is the plain validation, less room drops more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nanoworks.checkpoint import load_checkpoint
from nanoworks.cli.main import app
from nanoworks.common.errors import UserError
from nanoworks.config.recipe import DataSection, WeightedMethod
from nanoworks.evals.bpb import BpbOptions, text_bits_per_byte
from nanoworks.nn.moe import AS_BUILT, MoE
from nanoworks.train.capacity import capacity_sweep, validation_of
from nanoworks.train.launch import launch
from tests.train.test_experts import MODEL
from tests.train.tiny import corpus, recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sweep")
    validation = [{"name": "jsonl", "path": str(corpus(root)), "split": "all"}]
    return launch(recipe(root, model=MODEL, data={"validation": validation}, train={"length": "8 steps"})).run


def test_the_table_of_a_run(run: Path) -> None:
    command = ["sweep-capacity", str(run), "--factors", "0.25,1,4", "--tokens", "4096", "--rows", "4"]
    result = CliRunner().invoke(app, [*command, "--json"])
    assert result.exit_code == 0, result.output
    points = json.loads(result.output)
    assert [p["factor"] for p in points] == [None, 0.25, 1.0, 4.0]
    none, tight, even, wide = points
    assert none["dropped"] == wide["dropped"] == 0  # of 4 experts none can get more than 4 even shares
    assert wide["loss"] == pytest.approx(none["loss"], abs=1e-6)
    assert tight["dropped"] > even["dropped"] > 0
    assert tight["dropped"] >= 0.75  # there is room for a quarter
    assert abs(tight["loss"] - none["loss"]) > 1e-4
    table = CliRunner().invoke(app, [*command, "--factors", "1"])
    assert "capacity" in table.output
    assert "none" in table.output


def test_without_a_capacity_it_is_bits_per_byte_and_the_model_is_left_as_it_was(run: Path) -> None:
    checkpoint = load_checkpoint(run)
    file = str(run.parents[1] / "corpus.jsonl")
    text = WeightedMethod(name="jsonl", path=file, split="all")
    data = DataSection(sequence_length=64, validation=[text], packing="stream")
    [point, _] = capacity_sweep(checkpoint, [0.5], data=data, rows=4, tokens=10**9)
    assert checkpoint.tokenizer is not None
    options = BpbOptions(path=file, sequence_length=64, batch_size=4, tokens=10**9)
    expected = text_bits_per_byte(checkpoint.model, checkpoint.tokenizer, options)
    assert (point.loss, point.bpb) == pytest.approx((expected["loss"], expected["bpb"]), rel=1e-5)
    for module in checkpoint.model.modules():
        assert not module.training
        if isinstance(module, MoE):
            assert module.rules == AS_BUILT


def test_a_run_is_measured_on_its_own_validation_data_as_it_validates(tmp_path: Path) -> None:
    validation = [{"name": "jsonl", "path": str(corpus(tmp_path)), "split": "all"}]
    data = {"validation": validation, "document_mask": True, "packing": "stream"}
    changes = {"model": MODEL, "data": data, "eval": {"tokens": 10**9}, "train": {"length": "2 steps"}}
    run = launch(recipe(tmp_path, **changes)).run
    expected = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["val/loss"]
    found = validation_of(run)
    assert found is not None
    [point] = capacity_sweep(load_checkpoint(run), [], data=found[0], loss_on=found[1], rows=2, tokens=10**9)
    assert point.loss == pytest.approx(expected, rel=3e-4)  # documents come in another order
    assert validation_of(tmp_path) is None


def test_what_cannot_be_swept_is_refused(run: Path, tmp_path: Path) -> None:
    data = DataSection(sequence_length=64, validation=[WeightedMethod(name="stdlib")])
    for factor in (-1.0, 0.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match=f"above 0, not {factor:g}"):
            list(capacity_sweep(load_checkpoint(run), [1, factor], data=data))
    for text in ("1,x", ",", ""):
        result = CliRunner().invoke(app, ["sweep-capacity", str(run), "--factors", text])
        assert result.exit_code != 0
        assert "is no list of numbers" in str(result.exception) + result.output
    dense = launch(recipe(tmp_path, train={"length": "1 steps"})).run
    with pytest.raises(UserError, match="nanochat, which has no experts"):
        list(capacity_sweep(load_checkpoint(dense), [1], data=data))
