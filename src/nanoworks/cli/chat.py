"""`nanoworks chat CHECKPOINT`: talk to a model in the terminal, or ask it one thing from a script."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

INTERRUPTED = 130  # the shell's status for Ctrl-C


def chat_command(
    checkpoint: Annotated[str, typer.Argument(help="A run, a step, a model directory or a hub id.")],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Answer this once and exit; for scripts.")
    ] = None,
    complete: Annotated[
        bool, typer.Option("--complete", help="Continue raw text: for a base model, which cannot chat yet.")
    ] = False,
    system: Annotated[str, typer.Option(help="System message.")] = "",
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.6,
    top_k: Annotated[int, typer.Option(min=0, help="Sample among the k likeliest tokens; 0 means all.")] = 50,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    seed: Annotated[int | None, typer.Option(help="Makes the conversation repeatable.")] = None,
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
) -> None:
    """Talk to a model: answers stream, tool calls are shown; /help lists edit, regenerate and the rest."""
    import nanoworks
    from nanoworks.engine import EngineConfig, SamplingParams
    from nanoworks.serve.session import ChatSession, TextSession
    from nanoworks.serve.terminal import Terminal, show

    model = nanoworks.load(checkpoint, device=device, dtype=dtype, tensor_parallel=tensor_parallel)
    params = SamplingParams(temperature=temperature, top_k=top_k or None, max_tokens=max_tokens, seed=seed)
    kind = TextSession if complete else ChatSession
    config = EngineConfig(quantize=None if quantize == "none" else quantize, kv_dtype=kv_dtype)
    session = kind(model.engine(config, consume=True), params, system=system)
    if prompt is None:
        Terminal(session).run()
    elif not show(session.ask(prompt), session):
        raise typer.Exit(INTERRUPTED)
