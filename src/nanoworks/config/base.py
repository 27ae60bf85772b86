"""The base of every configuration object: immutable, and closed to unknown keys."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Frozen(BaseModel):
    """A frozen pydantic model in which an unknown key is an error (a typo never passes silently)."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())


class Method(BaseModel):
    """A named choice among registered methods, with that method's own options beside the name.

    In YAML either `{name: parquet, path: data/}` or, without options, just `parquet`. The options are
    checked by `Registry.parse` against the class that declares them, before anything starts.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})
