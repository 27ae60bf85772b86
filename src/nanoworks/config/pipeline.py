"""The schema of a pipeline: a tokenizer, then stages that each start from the one before (the demo is one)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from nanoworks.common.errors import UserError
from nanoworks.common.validation import explain
from nanoworks.config.base import Frozen
from nanoworks.config.load import find_recipe, read_file
from nanoworks.config.recipe import WeightedMethod


class TokenizerSection(Frozen):
    vocab_size: int = Field(gt=256 + 9, description="256 bytes, 9 special tokens, the rest are merges")
    trainer: Literal["rustbpe", "hf"] = "rustbpe"
    characters: int = Field(default=10_000_000, gt=0, description="text to learn the merges from")
    data: list[WeightedMethod] = Field(min_length=1)


class Pipeline(Frozen):
    name: str
    tokenizer: TokenizerSection
    stages: list[str] = Field(min_length=1, description="recipes, relative to this file; a run is named after each")
    prompts: list[str] = Field(default_factory=list, description="questions put to the model at the end")


def load_pipeline(path: str | Path) -> tuple[Pipeline, list[Path]]:
    """Return the pipeline and the paths of its stages' recipes; faults are UserErrors."""
    file = find_recipe(path)
    try:
        pipeline = Pipeline(**read_file(file))
    except ValidationError as error:
        raise UserError(f"{file}:\n{explain(error, Pipeline)}") from None
    return pipeline, [find_recipe(file.parent / stage) for stage in pipeline.stages]
