"""The JSON that DeepSpeed is given: what the recipe says, with what the user's own file or mapping says over it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nanoworks.common.errors import UserError
from nanoworks.config.parallel import ParallelSection

_BUCKET = 500_000_000
"""Elements of a bucket of gradients, DeepSpeed's own default; it is allocated, so a smaller model has a smaller one."""

_RECIPE = {
    "train_batch_size": "train.tokens_per_step",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.tokens_per_step",
    "gradient_clipping": "train.grad_clip",
    "optimizer": "optim.name",
    "scheduler": "schedule.name",
    "bf16": "hardware.dtype",
    "activation_checkpointing": "hardware.activation_checkpointing",
}
"""What the recipe says alone, because the trainer does it or must know it: DeepSpeed's key -> where it is said."""

_NOT_HERE = {
    "fp16": "its losses are scaled, and hardware.dtype has no float16; use bfloat16",
    "amp": "use hardware.dtype",
    "torch_autocast": "use hardware.dtype",
    "compile": "layers with DeepSpeed's hooks are not compiled",
    "tensor_parallel": "use strategy: native with tensor",
    "managed_gradient_accumulation": "the trainer says when a step ends",
}


def configuration(
    section: ParallelSection, compute_dtype: torch.dtype, *, parameters: int, device: torch.device
) -> dict[str, Any]:
    """The configuration for a model of so many parameters; a value "auto" of the user's leaves ours.

    Raises:
        UserError: the user's file cannot be read, or says what the recipe says or what is not built.
    """
    host = {"device": "cpu", "pin_memory": device.type == "cuda"}
    zero: dict[str, Any] = {
        "stage": section.zero_stage,
        "reduce_bucket_size": min(_BUCKET, max(1, parameters)),
        "allgather_bucket_size": min(_BUCKET, max(1, parameters)),
    }
    if section.zero_stage == 3:
        zero["memory_efficient_linear"] = False  # it would replace torch.nn.functional.linear, for all in the process
    if section.offload != "none":
        zero["offload_optimizer"] = dict(host)
    if section.offload == "all":
        zero["offload_param"] = dict(host)
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # only its log lines know of rows
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": compute_dtype == torch.bfloat16},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        # Both allow torch's AdamW, with the roles and rates of the recipe, on the host too.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    users = _without_auto(_read(section.deepspeed))
    for key, where in _RECIPE.items():
        if key in users and users[key] != ours.get(key):
            raise UserError(f"parallel.deepspeed: {key} is said by {where}; take it out")
    for key, why in _NOT_HERE.items():
        value = users.get(key)
        if key in users and not (isinstance(value, Mapping) and value.get("enabled") is False):
            raise UserError(f"parallel.deepspeed: {key} is not taken: {why}")
    merged = _merge(ours, users)
    zero = merged["zero_optimization"]
    if zero["stage"] != section.zero_stage:
        raise UserError(
            f"parallel.deepspeed: zero_optimization.stage is {zero['stage']} but parallel.zero_stage is "
            f"{section.zero_stage}; set parallel.zero_stage={zero['stage']}"
        )
    for key in ("offload_optimizer", "offload_param"):
        if (zero.get(key) or {}).get("device") == "nvme":
            raise UserError(f"parallel.deepspeed: {key} to nvme is not built; use cpu")
    return merged


def _read(given: Mapping[str, Any] | str) -> dict[str, Any]:
    if not isinstance(given, str):
        return dict(given)
    try:
        found = json.loads(Path(given).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"parallel.deepspeed: {given} cannot be read: {error.strerror}; give a JSON file") from error
    except ValueError as error:
        raise UserError(f"parallel.deepspeed: {given} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"parallel.deepspeed: {given} holds no mapping")
    return found


def _without_auto(values: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: _without_auto(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    return {key: value for key, value in kept.items() if value not in ("auto", {})}


def _merge(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in theirs.items():
        mine = merged.get(key)
        merged[key] = _merge(mine, value) if isinstance(mine, Mapping) and isinstance(value, Mapping) else value
    return merged
