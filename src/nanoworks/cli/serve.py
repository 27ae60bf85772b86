"""`nanoworks serve CHECKPOINT`: an OpenAI-compatible endpoint and a chat page over one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def serve_command(
    checkpoint: Annotated[str, typer.Argument(help="A run, a step, a model directory or a hub id.")],
    host: Annotated[str, typer.Option(help="Address; 0.0.0.0 is every interface.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's name in the API; default: the checkpoint's.")] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Answers computed at the same time.")] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, xpu or mps.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; default: as stored.")] = None,
    tensor_parallel: Annotated[
        int, typer.Option(min=1, help="Processes to spread the model over; a GPU each, or the CPU's threads shared.")
    ] = 1,
    quantize: Annotated[
        Literal["none", "int8", "int4"],
        typer.Option(
            help="Round the weights while loading: int8 takes half the memory of bfloat16 and is hardly less exact, "
            "int4 a quarter and is noticeably less exact in small models."
        ),
    ] = "none",
    kv_dtype: Annotated[
        Literal["auto", "int8"],
        typer.Option(
            help="Of the keys and values of past tokens: int8 holds nearly twice the tokens of bfloat16; CPU only."
        ),
    ] = "auto",
    speculate: Annotated[
        Literal["none", "ngram", "draft", "medusa"],
        typer.Option(help="Guess tokens ahead and verify them together: the same answers, faster."),
    ] = "none",
    draft_model: Annotated[
        str | None, typer.Option(help="A smaller model for `draft`; for `medusa` a run with heads, default CHECKPOINT.")
    ] = None,
    max_draft: Annotated[int, typer.Option(min=1, max=64, help="Tokens guessed ahead at most.")] = 8,
) -> None:
    """Serve a model: POST /v1/chat/completions, GET /v1/models, /health, and a chat page at /."""
    import nanoworks
    from nanoworks.engine import EngineConfig
    from nanoworks.serve.app import create_app
    from nanoworks.serve.server import listen, run

    # The port is taken first: a mistake there should not cost the time to load a model.
    with listen(host, port) as sock:
        model = nanoworks.load(checkpoint, device=device, dtype=dtype, tensor_parallel=tensor_parallel)
        engine = model.engine(
            EngineConfig(
                max_num_seqs=max_num_seqs,
                quantize=None if quantize == "none" else quantize,
                kv_dtype=kv_dtype,
                speculate=speculate,
                draft_model=draft_model,
                max_draft=max_draft,
            ),
            consume=True,
        )
        name = name or _name(checkpoint)
        run(create_app(engine, name=name), sock, model=name)


def _name(checkpoint: str) -> str:
    """The run's name for one of its steps, else the last part of the path or hub id."""
    path = Path(checkpoint).resolve()
    return path.parent.name if path.name.startswith("step-") else path.name
