"""`nanoworks train RECIPE [path=value ...]`: one stage of training."""

from __future__ import annotations

import sys
from typing import Annotated

import typer


def train_command(
    recipe: Annotated[str, typer.Argument(help="A YAML or JSON file, or the name of a recipe that comes along.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PATH=VALUE]...", help="E.g. model.depth=12 optim.lr_matrix=0.01"),
    ] = None,
    profile: Annotated[str | None, typer.Option(help="Overlay: dev, test, prod, or one of the recipe's own.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest good step of the run.")] = False,
) -> None:
    """Train one stage (pretrain, midtrain, sft or rl: the recipe says which).

    Examples:

      nanoworks train pretrain/nanochat model.depth=12 tokenizer=runs/tokenizer

      nanoworks train runs/d12/config.yaml --resume

    Ctrl-C and SIGTERM save at the next step and exit 0; `nanoworks config RECIPE` shows what a recipe resolves to.
    """
    from nanoworks.config import load_recipe
    from nanoworks.train.launch import launch
    from nanoworks.train.trainer import NonFinite

    resolved = load_recipe(recipe, overrides or (), profile=profile)
    try:
        outcome = launch(resolved, resume=resume)
    except NonFinite as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(3) from None
    if not outcome.is_main:
        return
    if outcome.finished:
        print(f"finished: {outcome.run}  (report: nanoworks report {outcome.run})")
    else:
        print(f"stopped and saved; resume with: nanoworks train {outcome.run}/config.yaml --resume")
