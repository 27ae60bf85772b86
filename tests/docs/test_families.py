"""docs/adding-a-family.md and docs/families.md say what is there."""

from __future__ import annotations

import re
from pathlib import Path

from nanoworks.config.load import find_recipe
from nanoworks.models import ARCHITECTURES

ROOT = Path(__file__).parents[2]
ADDING, FAMILIES = ((ROOT / "docs" / name).read_text() for name in ("adding-a-family.md", "families.md"))
SOURCE = ROOT / "src" / "nanoworks" / "models" / "smollm3.py"


def test_the_code_shown_is_that_of_the_repository() -> None:
    files = [SOURCE, SOURCE.with_name("registry.py"), ROOT / "tests" / "models" / "families.py"]
    lines = {line for file in files for line in file.read_text().splitlines()}
    shown = [line for block in re.findall(r"```python\n(.*?)```", ADDING, flags=re.S) for line in block.splitlines()]
    assert len(shown) > 30
    assert [line for line in shown if line.strip() not in ("", "...") and line not in lines] == []
    length = len(SOURCE.read_text().splitlines())
    assert f"SmolLM3's file has {length} lines" in ADDING
    assert length < 80


def test_every_test_of_the_suite_is_explained() -> None:
    suite = (ROOT / "tests" / "models" / "test_conformance.py").read_text()
    assert set(re.findall(r"`(test_\w+)`", ADDING)) == set(re.findall(r"^def (test_\w+)", suite, flags=re.M))


def test_every_family_has_a_row() -> None:
    assert set(re.findall(r"^\| `(\w+)` \|", FAMILIES, flags=re.M)) == set(ARCHITECTURES)


def test_every_recipe_named_exists() -> None:
    named = re.findall(r"`((?:pretrain|midtrain|sft|rl)/[\w.-]+)`", ADDING + FAMILIES)
    assert len(named) > 10
    for name in named:
        assert find_recipe(name).is_file()
