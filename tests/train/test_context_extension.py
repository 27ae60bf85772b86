"""Going on from a checkpoint with a longer context or another scaling of RoPE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nanoworks.checkpoint import load_checkpoint
from nanoworks.common.errors import UserError
from nanoworks.config.rope import scaled_theta
from nanoworks.train.launch import launch
from tests.train.tiny import recipe

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parent")
    values = {**recipe(root).model_dump(), "model": LLAMA}
    return launch(type(recipe(root))(**{**values, "train": {**values["train"], "length": "2 steps"}})).run


def longer(root: Path, parent: Path, model: dict[str, Any]) -> Any:
    values = recipe(root).model_dump()
    return type(recipe(root))(
        **{
            **values,
            "init_from": str(parent),
            "tokenizer": None,
            "model": model,
            "data": {**values["data"], "sequence_length": 128},
            "train": {**values["train"], "length": "2 steps"},
        }
    )


def test_a_longer_context_under_yarn_is_trained_and_kept(tmp_path: Path, parent: Path) -> None:
    run = launch(longer(tmp_path, parent, {"max_position_embeddings": 128, "rope_scaling": YARN})).run
    before, after = load_checkpoint(parent).config, load_checkpoint(run).config
    assert before.rope_scaling is None
    assert after.max_position_embeddings == 128
    assert after.rope_scaling is not None
    assert after.rope_scaling.model_dump(exclude_defaults=True) == {k: v for k, v in YARN.items() if k != "rope_type"}


def test_other_shapes_are_refused_by_name(tmp_path: Path, parent: Path) -> None:
    with pytest.raises(UserError, match=r"layers.0.mlp.gate_proj.weight would be \(96, 32\)"):
        launch(longer(tmp_path, parent, {"max_position_embeddings": 128, "intermediate_size": 96}))
    with pytest.raises(UserError, match=r"model\.sliding: unknown key"):
        launch(longer(tmp_path, parent, {"max_position_embeddings": 128, "sliding": 3}))


def test_the_scaled_base_divides_the_lowest_frequency_by_the_factor() -> None:
    theta, head_dim, factor = 10000.0, 64, 4.0
    exponents = torch.arange(0, head_dim, 2) / head_dim
    before, after = theta**-exponents, scaled_theta(theta, head_dim=head_dim, factor=factor) ** -exponents
    assert before[-1] / after[-1] == pytest.approx(factor, rel=1e-4)
    assert before[0] == after[0]
    with pytest.raises(ValueError, match="stretched by 1 or more"):
        scaled_theta(theta, head_dim=head_dim, factor=0.5)
