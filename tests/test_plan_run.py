"""The planner inside a run: `parallel.strategy: auto`, what does not fit, and what was predicted beside what came."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from nanoworks.common.errors import UserError
from nanoworks.config import Recipe
from nanoworks.config.parallel import ParallelSection
from nanoworks.train.launch import launch
from nanoworks.train.plan import hardware
from tests.parallel import tiny
from tests.parallel.ranks import ranks
from tests.train.tiny import recipe


def run(recipe: Recipe, memory: int | None = None) -> Any:
    """`launch` on this rank of a machine with `memory` bytes free; the text of what it refuses."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    logging.getLogger("nanoworks").setLevel(logging.INFO)
    free = hardware.memory_bytes
    if memory is not None:
        hardware.memory_bytes = lambda device: memory
    try:
        return launch(recipe)
    except UserError as error:
        return str(error)
    finally:
        hardware.memory_bytes = free
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name)


def selective(section: ParallelSection) -> tiny.Trained:
    return tiny.train("mixtral", section=section, checkpointing="selective")


def test_auto_runs_the_same_way_on_all_ranks_and_ends_with_a_comparison(tmp_path: Path) -> None:
    asked = recipe(tmp_path, parallel={"strategy": "auto"}, train={"length": "3 steps"})
    outcomes = ranks(2).run(run, asked)
    assert [(o.finished, o.is_main) for o in outcomes] == [(True, True), (True, False)]
    info = json.loads((outcomes[0].run / "run.json").read_text())
    assert info["world_size"] == 2
    assert info["plan"]["predicted"].keys() == info["plan"]["actual"].keys()
    assert all(value > 0 for part in ("predicted", "actual") for value in info["plan"][part].values())
    assert "predicted" in (outcomes[0].run / "logs" / "rank-000.log").read_text()
    assert "strategy: auto" not in (outcomes[0].run / "config.yaml").read_text()


def test_what_does_not_fit_a_rank_is_refused_on_all_with_what_would(tmp_path: Path) -> None:
    large = recipe(tmp_path, train={"micro_batch_size": 100_000})
    for said in ranks(2).run(run, large, 1000 * 2**20):
        assert "100000 rows needs about" in said
        assert "a rank" in said
        assert "would fit" in said
    for said in ranks(2).run(run, recipe(tmp_path), 200 * 2**20):
        assert "not even one row fits" in said
    for said in ranks(2).run(run, recipe(tmp_path, parallel={"strategy": "auto"}), 200 * 2**20):
        assert "no way to train this on 2xcpu" in said
    assert not list((tmp_path / "runs").glob("*/run.json"))


@pytest.mark.parametrize("section", [{"shard": 2}, {"tensor": 2}, {"pipeline": 2}], ids=str)
def test_selective_checkpointing_is_exact_on_ranks(section: dict[str, Any]) -> None:
    expected = tiny.train("mixtral")
    for found in ranks(2).run(selective, ParallelSection(**section)):
        assert found.losses == pytest.approx(expected.losses, abs=1e-5)
        assert found.norms == pytest.approx(expected.norms, rel=1e-4)
