"""Every recipe that comes with nanoworks resolves: no unknown key, method or option in any of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanoworks.config import load_recipe
from nanoworks.config.load import read_file, recipes_dir
from nanoworks.config.pipeline import load_pipeline
from nanoworks.train.resolve import resolve

RECIPES = sorted(p for p in recipes_dir().rglob("*.yaml") if "stage" in read_file(p))
PIPELINES = sorted(p for p in recipes_dir().rglob("*.yaml") if "stages" in read_file(p))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(recipes_dir())))
def test_recipe_resolves(path: Path) -> None:
    links = ["init_from=runs/parent"] if read_file(path).get("model") is None else ["tokenizer=runs/tokenizer"]
    plan = resolve(load_recipe(path, links, environ={}))
    assert plan.stage_options is not None


@pytest.mark.parametrize("path", PIPELINES, ids=lambda p: str(p.relative_to(recipes_dir())))
def test_pipeline_names_recipes_that_exist(path: Path) -> None:
    pipeline, recipes = load_pipeline(path)
    assert len(recipes) == len(pipeline.stages)


def test_there_are_recipes_for_every_stage() -> None:
    stages = {load_recipe(p, ["init_from=x", "tokenizer=y"], environ={}).stage.name for p in RECIPES}
    assert stages == {"pretrain", "midtrain", "sft", "rl", "medusa"}
