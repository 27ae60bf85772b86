"""`nanoworks upcycle SRC --experts 8 --top-k 2 --out DIR`: make a mixture of experts of a dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def upcycle_command(
    source: Annotated[
        str, typer.Argument(help="Run, step or model directory, or hub id, of a llama, mistral or qwen3.")
    ],
    out: Annotated[Path, typer.Option(help="Directory to write; it must not exist.")],
    experts: Annotated[int, typer.Option(min=2, help="Experts in each layer.")] = 8,
    top_k: Annotated[int, typer.Option(min=1, help="Experts that a token goes to.")] = 2,
    noise: Annotated[
        float, typer.Option(min=0.0, help="Noise on each expert's weights, as a share of their standard deviation.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the routers' first weights and the noise.")] = 0,
) -> None:
    """Make a mixture whose experts are copies of the dense model's feed-forward blocks; it answers as that did.

    Train on from it with `init_from: DIR`; without training it is a larger model that knows no more.
    """
    from nanoworks.checkpoint.describe import describe
    from nanoworks.checkpoint.upcycle import upcycle
    from nanoworks.common.human import count

    config = upcycle(source, out, experts=experts, top_k=top_k, noise=noise, seed=seed)
    found = describe(out)
    typer.echo(
        f"wrote {out}: a {config.model_type} of {experts} experts, {top_k} a token; {count(found.parameters)} "
        f"parameters, {count(found.active_parameters)} work on a token\n"
        f"train on with: nanoworks train RECIPE init_from={out}"
    )
