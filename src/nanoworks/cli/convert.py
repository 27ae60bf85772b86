"""`nanoworks convert SRC --to hf|nanochat|gguf --out DIR`: change the layout or the dtype of a checkpoint."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Layout(str, Enum):
    hf = "hf"
    nanochat = "nanochat"
    gguf = "gguf"


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def convert_command(
    source: Annotated[str, typer.Argument(help="Run, step, Hugging Face or nanochat directory, or hub id.")],
    out: Annotated[Path, typer.Option(help="Directory to write; it must not exist.")],
    to: Annotated[
        Layout,
        typer.Option(help="hf: what from_pretrained loads; nanochat: model_*.pt and meta_*.json; gguf: for llama.cpp."),
    ],
    dtype: Annotated[Dtype | None, typer.Option(help="Of the weights; default: as stored.")] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="For hf, e.g. 5GB: largest file of weights; default: files as they are.")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Compare what both sides answer; parity.json says so.")] = True,
) -> None:
    """Convert a checkpoint, and certify in parity.json that the result answers as the source does.

    A result that does not is kept in OUT.failed, and the exit status is 2.
    """
    import torch
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from nanoworks.checkpoint.convert import convert

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("reading", total=None)
        convert(
            source,
            out,
            to.value,
            dtype=None if dtype is None else getattr(torch, dtype.value),
            max_shard_bytes=None if max_shard_size is None else parse_size(max_shard_size),
            verify=verify,
            progress=lambda stage, done, total: bar.update(
                task, description=stage, completed=done, total=total or None
            ),
        )
    print(f"wrote {out}")


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MB", "64KB" or "1000", in powers of ten as Hugging Face counts them."""
    from nanoworks.common.errors import UserError

    units = {"GB": 10**9, "MB": 10**6, "KB": 10**3, "B": 1, "": 1}
    number = text.strip().upper().rstrip("GMKB")
    unit = text.strip().upper()[len(number) :].strip()
    try:
        size = int(float(number) * units[unit])
    except (ValueError, KeyError):
        size = 0
    if size <= 0:
        raise UserError(f"{text!r} is no size; write it like 5GB, 500MB or 64KB")
    return size
