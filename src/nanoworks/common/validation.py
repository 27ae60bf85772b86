"""Turns pydantic's validation errors into lines a person can act on: where, what, and the nearest key."""

from __future__ import annotations

import types
import typing
from typing import Any

from pydantic import BaseModel, ValidationError

from nanoworks.common.errors import nearest


def explain(error: ValidationError, model: type[BaseModel], *, prefix: str = "") -> str:
    """Return one line for each thing that is wrong, e.g.
    `train.token_per_step: unknown key (did you mean 'tokens_per_step'?)`."""
    lines = []
    for item in error.errors():
        location = [str(part) for part in item["loc"]]
        where = ".".join(([prefix] if prefix else []) + location) or "config"
        if item["type"] == "extra_forbidden":
            siblings = _fields_at(model, location[:-1])
            lines.append(f"{where}: unknown key{nearest(location[-1], siblings)}")
        elif item["type"] == "missing":
            lines.append(f"{where}: required, but not given")
        else:
            message = item["msg"].removeprefix("Value error, ")
            given = item.get("input")
            shown = f" (got {given!r})" if isinstance(given, (str, int, float, bool)) else ""
            lines.append(f"{where}: {message}{shown}")
    return "\n".join(lines)


def _fields_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """Names of the fields of the model nested at `path` inside `model`."""
    current: type[BaseModel] | None = model
    for part in path:
        if current is None:
            return []
        field = current.model_fields.get(part)
        current = _model_in(field.annotation) if field else (current if part.isdigit() else None)
    return list(current.model_fields) if current else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model inside `X | None`, `list[X]` and the like."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list, tuple, typing.Annotated):
        for argument in typing.get_args(annotation):
            if (found := _model_in(argument)) is not None:
                return found
    return None
