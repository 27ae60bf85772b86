from __future__ import annotations

import pytest
from pydantic import BaseModel, ConfigDict, Field

from nanoworks.common.errors import UserError
from nanoworks.common.registry import Registry


class Circle:
    class Options(BaseModel):
        model_config = ConfigDict(extra="forbid")
        radius: float = Field(default=1.0, gt=0)


def shapes() -> Registry[type]:
    registry: Registry[type] = Registry("shape", {"square": "no.such.module"})
    registry.register("circle")(Circle)
    return registry


def test_listing_names_imports_nothing() -> None:
    registry = shapes()
    assert list(registry) == ["circle", "square"]
    assert "square" in registry
    with pytest.raises(ModuleNotFoundError):
        registry.get("square")


def test_options_are_validated_with_the_place_and_the_nearest_key() -> None:
    registry = shapes()
    assert registry.parse("circle", {"radius": 2}).radius == 2
    with pytest.raises(UserError, match=r"shape circle\.raduis: unknown key \(did you mean 'radius'\?\)"):
        registry.parse("circle", {"raduis": 2})
    with pytest.raises(UserError, match=r"a\.b\.radius: .*greater than 0 \(got -1\)"):
        registry.parse("circle", {"radius": -1}, where="a.b")


def test_unknown_and_double_names() -> None:
    registry = shapes()
    with pytest.raises(UserError, match=r"unknown shape 'sqare' \(did you mean 'square'\?\); known: circle, square"):
        registry.get("sqare")
    with pytest.raises(ValueError, match="two shapes are called 'circle'"):
        registry.register("circle")(int)
