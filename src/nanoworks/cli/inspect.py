"""`nanoworks inspect SRC`: what a checkpoint is and what it will cost, without reading its weights."""

from __future__ import annotations

import json
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer

from nanoworks.cli.convert import Dtype
from nanoworks.common import human

if TYPE_CHECKING:
    from nanoworks.checkpoint.describe import Description


def inspect_command(
    source: Annotated[str, typer.Argument(help="Run, step, Hugging Face or nanochat directory, or hub id.")],
    context: Annotated[int | None, typer.Option(min=1, help="Tokens a sequence; default: the model's.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="For the figures of memory.")] = Dtype.bfloat16,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print family, sizes, cost, tokenizer and lineage of a model; of a hub id, no weights are downloaded."""
    import torch

    from nanoworks.checkpoint.describe import describe

    found = describe(source, context=context, dtype=getattr(torch, dtype.value))
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
        return
    width = 18
    for label, text in lines(found):
        print(f"{label:<{width}}{text}")


def lines(d: Description) -> list[tuple[str, str]]:
    """(label, text) of what is worth a line."""
    active = "" if d.active_parameters == d.parameters else f", {_count(d.active_parameters)} active"
    tied = ", head tied to the embedding" if d.tied_head else ""
    stored = ", ".join(f"{name} {_size(size)}" for name, size in d.stored_dtypes.items()) or "not here"
    rope = ", ".join(f"{key} {_short(value)}" for key, value in d.rope.items())
    found = [
        ("family", f"{d.family} ({d.architecture})"),
        ("parameters", f"{_count(d.parameters)}{active}{tied}"),
        ("stored", stored),
        ("layers", f"{d.layers} of {d.hidden_size} features"),
        ("heads", f"{d.heads} queries, {d.key_value_heads} keys and values, {d.head_dim} features each"),
        ("window", _windows(d.windows)),
        ("rope", rope),
    ]
    if d.experts:
        found.append(("experts", f"{d.experts['total']}, {d.experts['a token']} a token"))
    found += [
        ("context", f"{d.context:,} tokens (the model's: {d.max_position_embeddings:,})"),
        ("forward", f"{human.count(d.flops_per_token)} FLOPs a token at this context, three times that in training"),
        ("KV cache", f"{d.kv_bytes_per_token:,} bytes a token, {_size(d.kv_bytes)} a sequence of this context"),
        ("memory", f"{_size(d.weight_bytes)} of weights and {_size(d.kv_bytes)} a sequence, in {d.dtype}"),
    ]
    if d.tokenizer:
        special = ", ".join(f"{name} {id}" for name, id in list(d.tokenizer["special_tokens"].items())[:9])
        more = len(d.tokenizer["special_tokens"]) - 9
        found.append(("tokenizer", f"{d.tokenizer['vocab_size']:,} tokens, {d.tokenizer['fingerprint'][:12]}"))
        found.append(("special tokens", special + (f" and {more} more" if more > 0 else "") if special else "none"))
    else:
        found.append(("tokenizer", "none"))
    found += [(name.replace("_", " "), _short(value)) for name, value in d.lineage.items()]
    return found


def _windows(windows: list[int | None]) -> str:
    runs = [(window, len(list(run))) for window, run in groupby(windows)]
    if len(runs) == 1:
        return f"{runs[0][0]:,} tokens" if runs[0][0] else "none"
    return ", ".join(f"{count} x {window or 'all'}" for window, count in runs)


def _count(number: int) -> str:
    return f"{human.count(number)} ({number:,})"


def _size(number: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number} bytes"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
