"""The tables of docs/coming-from-nanochat.md say only what works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main

from nanoworks.cli.main import app
from nanoworks.config import load_recipe
from nanoworks.train.resolve import resolve

PAGE = (Path(__file__).parents[2] / "docs" / "coming-from-nanochat.md").read_text()


def cells(body: str) -> list[str]:
    """What stands in backticks in the last column of the tables of `body`."""
    rows = [row.rsplit("|", 2)[1] for row in body.splitlines() if row.startswith("| ")]
    return re.findall(r"`([^`]+)`", " ".join(rows))


SECTIONS = {title: cells(body) for title, body in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.M | re.S)}
RECIPES = {title.split("`")[1]: found for title, found in SECTIONS.items() if re.search(r"`\w+/nanochat`", title)}
COMMANDS = {title.split("`")[1]: found for title, found in SECTIONS.items() if "`nanoworks " in title}


def command(words: list[str]) -> typer.main.TyperCommand:
    """The command that `words` (after `nanoworks`) begin with."""
    group = typer.main.get_command(app)
    while hasattr(group, "commands"):
        group = group.commands[words.pop(0)]
    return group  # type: ignore[return-value]


def options_of(words: list[str]) -> set[str]:
    return {name for parameter in command(words).params for name in parameter.opts}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_override_resolves(recipe: str) -> None:
    overrides = [c.replace('"', "") for c in RECIPES[recipe] if re.fullmatch(r"[a-z_.0-9]+=.+", c)]
    assert len(overrides) > 10
    links = ["tokenizer=runs/tokenizer"] if recipe.startswith("pretrain") else ["init_from=runs/parent"]
    for override in overrides:
        resolve(load_recipe(recipe, [*links, override], environ={}))


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_option_exists(verb: str) -> None:
    known = options_of(verb.split()[1:])
    options = [cell.split()[0] for cell in COMMANDS[verb] if cell.startswith("--")]
    assert options
    assert set(options) <= known


def test_every_command_exists_with_its_options() -> None:
    commands = [cell for found in SECTIONS.values() for cell in found if cell.startswith("nanoworks ")]
    commands += [line.split("#")[0].strip() for line in PAGE.splitlines() if line.startswith("nanoworks ")]
    assert len(commands) > 10
    for line in commands:
        words = line.split()[1:]
        assert {w for w in words if w.startswith("--")} <= options_of(list(words)), line
