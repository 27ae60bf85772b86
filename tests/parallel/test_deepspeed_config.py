"""The configuration that DeepSpeed is given, and sections and files that contradict the recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nanoworks.common.errors import UserError
from nanoworks.config.parallel import ParallelSection
from nanoworks.parallel.deepspeed_config import configuration

CPU = torch.device("cpu")


def test_the_configuration_is_the_recipes_with_the_users_keys_over_it(tmp_path: Path) -> None:
    section = ParallelSection(
        strategy="deepspeed",
        zero_stage=3,
        offload="all",
        deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}},
    )
    made = configuration(section, torch.bfloat16, parameters=1000, device=CPU)
    assert made["bf16"] == {"enabled": True}
    assert made["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 1000,
        "allgather_bucket_size": 1000,
        "memory_efficient_linear": False,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
        "offload_param": {"device": "cpu", "pin_memory": False},
        "stage3_param_persistence_threshold": 0,
    }
    users = {
        "train_batch_size": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 7, "allgather_bucket_size": "auto"},
        "wall_clock_breakdown": True,
    }
    (tmp_path / "users.json").write_text(json.dumps(users))
    section = ParallelSection(strategy="deepspeed", zero_stage=2, deepspeed=str(tmp_path / "users.json"))
    made = configuration(section, torch.float32, parameters=1000, device=CPU)
    assert made["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 7, "allgather_bucket_size": 1000}
    assert made["wall_clock_breakdown"] is True
    assert made["bf16"] == {"enabled": False}


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"strategy": "native", "zero_stage": 2}, "zero_stage needs strategy: deepspeed"),
        ({"strategy": "auto", "deepspeed": {"x": 1}}, "deepspeed needs strategy: deepspeed"),
        ({"shard": 2}, "shard: not with strategy: deepspeed.*leave it out"),
        ({"cpu_offload": True, "tensor": 2}, "tensor, cpu_offload: not with"),
        ({"pipeline": 2}, "pipeline: not with"),
        ({"context": 2}, "context: not with"),
        ({"expert": 2}, "expert: not with"),
        ({"zero_stage": 2, "offload": "all"}, "needs zero_stage: 3"),
    ],
)
def test_sections_that_contradict_themselves(section: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ParallelSection(**{"strategy": "deepspeed", **section})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"train_batch_size": 8}, "train_batch_size is said by train.tokens_per_step; take it out"),
        ({"train_micro_batch_size_per_gpu": 4}, "is said by train.micro_batch_size"),
        ({"gradient_clipping": 1.0}, "is said by train.grad_clip"),
        ({"optimizer": {"type": "Adam"}}, "is said by optim.name"),
        ({"scheduler": {"type": "WarmupLR"}}, "is said by schedule.name"),
        ({"bf16": {"enabled": True}}, "is said by hardware.dtype"),
        ({"fp16": {"enabled": True}}, "fp16 is not taken.*use bfloat16"),
        ({"zero_optimization": {"stage": 1}}, r"stage is 1 .*set parallel.zero_stage=1"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "nvme is not built; use cpu"),
        ("/nowhere/ds.json", "/nowhere/ds.json cannot be read"),
    ],
)
def test_a_users_file_that_contradicts_the_recipe(given: Any, said: str) -> None:
    section = ParallelSection(strategy="deepspeed", deepspeed=given)
    with pytest.raises(UserError, match=said):
        configuration(section, torch.float32, parameters=1, device=CPU)


def test_a_file_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text("stage = 3")
    section = ParallelSection(strategy="deepspeed", deepspeed=str(tmp_path / "ds.json"))
    with pytest.raises(UserError, match="is not JSON"):
        configuration(section, torch.float32, parameters=1, device=CPU)
