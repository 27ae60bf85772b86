"""`nanoworks config RECIPE [path=value ...]`: show what a recipe resolves to, without training."""

from __future__ import annotations

from typing import Annotated

import typer


def config_command(
    recipe: Annotated[str, typer.Argument(help="A YAML or JSON file, or the name of a recipe that comes along.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[PATH=VALUE]...")] = None,
    profile: Annotated[str | None, typer.Option(help="Overlay: dev, test, prod, or one of the recipe's own.")] = None,
) -> None:
    """Print the recipe after extends, profile, environment (NANOWORKS__OPTIM__LR=...) and overrides, and check
    every name and option in it."""
    from nanoworks.config import load_recipe, to_yaml
    from nanoworks.train.resolve import resolve

    resolved = load_recipe(recipe, overrides or (), profile=profile)
    resolve(resolved)
    print(to_yaml(resolved), end="")
