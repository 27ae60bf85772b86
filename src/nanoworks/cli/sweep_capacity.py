"""`nanoworks sweep-capacity RUN`: quality, dropped tokens and speed of a mixture of experts at several capacities."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def sweep_capacity_command(
    checkpoint: Annotated[str, typer.Argument(help="A run, step or model directory of a mixture of experts.")],
    factors: Annotated[str, typer.Option(help="Capacity factors with commas between.")] = "0.5,0.75,1,1.25,1.5,2",
    path: Annotated[
        str | None, typer.Option(help="Text, .jsonl or .parquet; default: the run's validation data, else stdlib.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to measure on.")] = 65_536,
    rows: Annotated[int, typer.Option(min=1, help="Rows in a batch: what a capacity is counted over.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON and nothing else.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, xpu or mps.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; default: as stored.")] = None,
) -> None:
    """Measure a model at several capacity factors, to choose `moe.capacity_factor` by.

    An expert that has its share full lets further tokens pass; the first line is without a capacity.
    """
    import json
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    import nanoworks
    from nanoworks.common.errors import UserError
    from nanoworks.common.human import count, percent
    from nanoworks.config.recipe import DataSection, WeightedMethod
    from nanoworks.train.capacity import capacity_sweep, validation_of

    try:
        numbers = [float(text) for text in factors.split(",")]
    except ValueError:
        raise UserError(f"--factors {factors!r} is no list of numbers; write it like 0.5,1,1.5") from None
    model = nanoworks.load(checkpoint, device=device, dtype=dtype).checkpoint
    found = None if path else validation_of(model.path)
    if found is not None:
        data, loss_on = found
    else:
        kind = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}.get(Path(path or "").suffix, "text")
        text = WeightedMethod(name=kind, path=path, split="all") if path else WeightedMethod(name="stdlib")
        length = min(model.config.max_position_embeddings, 2048)
        data, loss_on = DataSection(sequence_length=length, validation=[text], packing="stream"), "all"
    points = capacity_sweep(
        model,
        numbers,
        data=data,
        loss_on=loss_on,
        rows=rows,
        tokens=tokens,
        device=model.model.embed_tokens.weight.device,
    )
    if as_json:
        typer.echo(json.dumps([asdict(point) for point in points], indent=2))
        return
    table = Table("capacity", "val loss", "val bpb", "dropped", "tokens/s", title=str(model.path))
    for point in points:
        table.add_row(
            "none" if point.factor is None else f"{point.factor:g}",
            f"{point.loss:.4f}",
            f"{point.bpb:.4f}",
            percent(point.dropped),
            count(point.tokens_per_second),
        )
    Console().print(table)
