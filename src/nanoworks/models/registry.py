"""The table of model families. Adding a family is one file and one line here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from nanoworks.common.errors import UserError
from nanoworks.common.registry import Registry
from nanoworks.common.validation import explain
from nanoworks.config.model import ModelConfig
from nanoworks.models.decoder import Decoder


@dataclass(frozen=True)
class Architecture:
    """One family: its configuration, its model, and what others need to know about it as data.

    `keymaps` maps a foreign layout ("hf", "nanochat") to rules {our name: their name}, each with at most one
    `*` that stands for the layer. `tp_plan` maps name patterns to "colwise" or "rowwise".
    """

    name: str
    config_cls: type[ModelConfig]
    model_cls: type[Decoder]
    keymaps: Mapping[str, Mapping[str, str]]
    tp_plan: Mapping[str, str] = field(default_factory=dict)


ARCHITECTURES: Registry[Architecture] = Registry(
    "model_type",
    {
        "llama": "nanoworks.models.llama",
        "mistral": "nanoworks.models.mistral",
        "mixtral": "nanoworks.models.mixtral",
        "qwen2": "nanoworks.models.qwen2",
        "qwen3": "nanoworks.models.qwen3",
        "qwen3_moe": "nanoworks.models.qwen3_moe",
        "smollm3": "nanoworks.models.smollm3",
        "nanochat": "nanoworks.models.nanochat",
        "nanochat_2026": "nanoworks.models.nanochat_2026",
    },
)


def config_from_dict(values: Mapping[str, Any]) -> ModelConfig:
    """Validate a family's configuration given in our own spelling (a recipe); unknown keys are errors."""
    config_cls = _architecture(values).config_cls
    try:
        return config_cls(**values)
    except ValidationError as error:
        raise UserError(explain(error, config_cls, prefix="model")) from None


def config_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """Validate the mapping of a `config.json`; keys we do not know are kept, not refused."""
    config_cls = _architecture(values).config_cls
    try:
        return config_cls.from_hf(values)
    except ValidationError as error:
        raise UserError(explain(error, config_cls, prefix="config.json")) from None


def build_model(config: ModelConfig) -> Decoder:
    """Build the model of `config` on torch's current default device, with uninitialised or default weights."""
    return ARCHITECTURES.get(config.model_type).model_cls(config)


def _architecture(values: Mapping[str, Any]) -> Architecture:
    if "model_type" not in values:
        raise UserError(f"the model has no model_type; known: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES.get(str(values["model_type"]))
