from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
from pydantic import Field

from nanoworks.config import Frozen, Method, Recipe

SCRIPT = Path(__file__).parents[2] / "scripts" / "config_reference.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("config_reference", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_document_is_up_to_date(script: ModuleType) -> None:
    assert script.TARGET.read_text(encoding="utf-8") == script.reference(), (
        "the schema changed; run: python scripts/config_reference.py"
    )


def test_every_key_of_a_recipe_and_every_method_is_there(script: ModuleType) -> None:
    text = script.reference()
    for name in Recipe.model_fields:
        assert f"| `{name}` |" in text
    for _, _, registry in script.METHODS:
        for name in registry:
            assert f"### `{name}`" in text


class _Example(Frozen):
    size: int = Field(gt=0, le=8, description="of a | thing")
    ratio: float | None = None
    mode: Literal["a", "b"] = "a"
    methods: list[Method] = Field(default_factory=lambda: [Method(name="x"), Method(name="y", lr=1)])
    betas: tuple[float, float] = (0.9, 0.95)
    place: str = Field(default="x", description="in <root>")
    anything: dict[str, Any] = Field(default_factory=dict)
    hidden: int = Field(default=0, exclude=True)


def test_a_table_says_type_limits_default_and_description(script: ModuleType) -> None:
    assert script.table(_Example).splitlines()[2:] == [
        "| `size` | integer > 0 and ≤ 8 | *required* | of a \\| thing |",
        "| `ratio` | number or null | `null` |  |",
        '| `mode` | `"a"` or `"b"` | `"a"` |  |',
        '| `methods` | list of method | `["x", {"name": "y", "lr": 1}]` |  |',
        "| `betas` | list of number | `[0.9, 0.95]` |  |",
        '| `place` | string | `"x"` | in &lt;root> |',
        "| `anything` | mapping | `{}` |  |",
    ]
