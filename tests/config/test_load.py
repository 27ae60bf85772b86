from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from nanoworks.common.errors import UserError
from nanoworks.config import Recipe, load_recipe, to_yaml
from nanoworks.config.load import find_recipe, merge, read_file, recipes_dir
from nanoworks.config.recipe import parse_length

BASE = {
    "stage": "pretrain",
    "tokenizer": "tok",
    "model": {"model_type": "nanochat", "depth": 2},
    "data": {"sequence_length": 64, "train": [{"name": "stdlib", "weight": 2.0}, "microworld"]},
    "train": {"length": "10 steps", "tokens_per_step": 128, "micro_batch_size": 2},
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(BASE))
    return path


def load(path: Path, *overrides: str, environ: dict[str, str] | None = None, profile: str | None = None) -> Recipe:
    return load_recipe(path, overrides, environ=environ or {}, profile=profile)


def test_a_method_may_be_a_bare_name_or_a_mapping(recipe: Path) -> None:
    resolved = load(recipe)
    assert [m.name for m in resolved.data.train] == ["stdlib", "microworld"]
    assert [m.weight for m in resolved.data.train] == [2.0, None]
    assert resolved.stage.name == "pretrain"


def test_layers_apply_in_order_file_profile_environment_override(recipe: Path) -> None:
    values = yaml.safe_load(recipe.read_text())
    values["profiles"] = {"dev": {"run": {"name": "from-profile", "seed": 1}}}
    recipe.write_text(yaml.safe_dump(values))
    environ = {"NANOWORKS__RUN__SEED": "2", "NANOWORKS__RUN__ROOT": "from-env"}
    resolved = load(recipe, "run.root=from-override", environ=environ, profile="dev")
    assert resolved.run.model_dump() == {"name": "from-profile", "seed": 2, "root": "from-override"}


def test_builtin_profiles_scale_logging_and_resources(recipe: Path) -> None:
    assert [t.name for t in load(recipe, profile="test").trackers] == ["jsonl"]
    assert load(recipe, profile="test").train.length == "3 steps"
    assert load(recipe, profile="prod").checkpoint.every == 500
    assert load(recipe, profile="dev").eval.max_examples == 50


def test_extends_merges_mappings_and_replaces_lists(tmp_path: Path, recipe: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text("extends: recipe.yaml\ndata: {train: [stdlib]}\ntrain: {micro_batch_size: 1}\n")
    resolved = load(child)
    assert [m.name for m in resolved.data.train] == ["stdlib"]
    assert resolved.data.sequence_length == 64
    assert resolved.train.micro_batch_size == 1


def test_json_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(BASE))
    assert load(path).train.tokens_per_step == 128


def test_another_choice_drops_the_options_of_the_former_one(recipe: Path) -> None:
    resolved = load(recipe, "optim.lr_matrix=0.1", "optim.name=adamw", "optim.lr=0.001")
    assert resolved.optim.options == {"lr": 0.001}
    assert merge({"stage": "rl"}, {"stage": {"kl": 1}}) == {"stage": {"name": "rl", "kl": 1}}


def test_override_reaches_into_lists(recipe: Path) -> None:
    assert load(recipe, "data.train.0.weight=3").data.train[0].weight == 3


def test_resolved_yaml_loads_to_the_same_recipe(tmp_path: Path, recipe: Path) -> None:
    resolved = load(recipe, "optim.lr_matrix=2e-4")
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(resolved))
    assert load(again) == resolved


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "train.token_per_step=5",
            r"train\.token_per_step: unknown key \(did you mean 'tokens_per_step'\?\)",
        ),
        ("trian.length=3 steps", r"trian: unknown key \(did you mean 'train'\?\)"),
        ("train.micro_batch_size=many", r"train\.micro_batch_size: .*integer.*'many'"),
        ("train.micro_batch_size=0", r"train\.micro_batch_size: .*greater than 0"),
        ("data.sequence_length=-5", r"data\.sequence_length: .*greater than 1"),
        ("data.train.0.weight=0", r"data\.train\.0\.weight: .*greater than 0"),
        ("data.train.7.weight=1", r"list of 2"),
        ("train.length=ten steps", r"train\.length: give a positive amount"),
        ("train.length=-1 steps", r"train\.length: give a positive amount"),
        ("no-equals-sign", r"path=value"),
    ],
)
def test_bad_input_names_place_reason_and_nearest_key(recipe: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(recipe, override)


def test_unknown_profile_and_unknown_recipe_name_the_nearest(recipe: Path) -> None:
    with pytest.raises(UserError, match=r"unknown profile 'prd' \(did you mean 'prod'\?\)"):
        load(recipe, profile="prd")
    known = next(recipes_dir().rglob("*.yaml")).relative_to(recipes_dir()).with_suffix("")
    with pytest.raises(UserError, match="did you mean"):
        find_recipe(f"{known}x")


def test_a_recipe_extends_one_that_comes_along_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: pretrain/nanochat\nmodel: {model_type: nanochat, depth: 4}\n")
    assert load_recipe(tmp_path / "mine.yaml", environ={}).model["depth"] == 4
    (tmp_path / "mine.yaml").write_text("extends: pretrain/nanochatt\n")
    with pytest.raises(UserError, match="did you mean 'pretrain/nanochat'"):
        load_recipe(tmp_path / "mine.yaml", environ={})


def test_a_recipe_that_extends_itself_or_is_no_mapping_or_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml")
    (tmp_path / "b.yaml").write_text("extends: a.yaml")
    with pytest.raises(UserError, match="extends itself"):
        read_file(tmp_path / "a.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UserError, match="mapping"):
        read_file(tmp_path / "list.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"run: \xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        read_file(tmp_path / "latin.yaml")


def test_the_schema_is_frozen(recipe: Path) -> None:
    with pytest.raises(Exception, match="frozen"):
        load(recipe).run.seed = 3  # type: ignore[misc]


def test_lengths_have_units() -> None:
    assert parse_length("20 tokens_per_parameter") == (20.0, "tokens_per_parameter")
    assert parse_length("1 epoch") == (1.0, "epochs")
    assert parse_length("1_000 steps").amount == 1000
