"""GET /v1/models."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "nanoworks"
    max_model_len: int
    """Tokens that a prompt and its answer can have together."""
    run_id: str | None = None
    """Of the training run that made the weights."""
    lineage: dict[str, Any] = {}
    """What the checkpoint says of its making: stage, step, parent, hash of the data, version."""


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]
