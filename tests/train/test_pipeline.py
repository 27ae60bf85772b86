"""A pipeline: tokenizer and stages in a chain, and that running it again is resuming it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from nanoworks.common.errors import UserError
from nanoworks.config.pipeline import load_pipeline
from nanoworks.train.pipeline import run_pipeline

STAGE = {
    "stage": "pretrain",
    "tokenizer": "set by the pipeline",
    "model": {"model_type": "nanochat", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1},
    "hardware": {"device": "cpu", "dtype": "float32", "threads": 1},
    "data": {"sequence_length": 64, "train": [{"name": "microworld", "pages": 2}], "buffer": 20},
    "train": {"length": "3 steps", "tokens_per_step": 128, "micro_batch_size": 2},
    "trackers": ["jsonl"],
}


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    sft = {**STAGE, "stage": "sft", "data": {**STAGE["data"], "train": ["microworld_identity"]}}
    for name, values in (("first", STAGE), ("second", sft)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
    values = {
        "name": "tiny",
        "tokenizer": {"vocab_size": 400, "characters": 50_000, "data": [{"name": "microworld", "pages": 2}]},
        "stages": ["first.yaml", "second.yaml"],
    }
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "pipeline.yaml"


def test_stages_form_a_chain_and_finished_ones_are_passed_over(tmp_path: Path, pipeline: Path) -> None:
    loaded, recipes = load_pipeline(pipeline)
    root = tmp_path / "runs"
    assert [(s.run.name, s.finished) for s in run_pipeline(loaded, recipes, root)] == [
        ("first", True),
        ("second", True),
    ]
    info = json.loads((root / "second" / "run.json").read_text())
    assert info["parent"] == str(root / "first" / "step-000003")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.safetensors")}
    assert all(s.finished for s in run_pipeline(loaded, recipes, root))
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.safetensors")} == before


def test_a_typo_in_the_last_stage_is_found_before_the_first_one_trains(tmp_path: Path, pipeline: Path) -> None:
    second = tmp_path / "second.yaml"
    second.write_text(second.read_text().replace("microworld_identity", "microworld_identiti"))
    loaded, recipes = load_pipeline(pipeline)
    with pytest.raises(UserError, match="did you mean 'microworld_identity'"):
        list(run_pipeline(loaded, recipes, tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_a_pipeline_names_its_unknown_keys(pipeline: Path) -> None:
    pipeline.write_text(pipeline.read_text().replace("stages:", "stage:"))
    with pytest.raises(UserError, match=r"stage: unknown key \(did you mean 'stages'"):
        load_pipeline(pipeline)
