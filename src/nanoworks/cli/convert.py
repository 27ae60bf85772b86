"""`nanoworks convert SRC --to hf|nanochat --out DIR`: change the layout of a checkpoint."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Layout(str, Enum):
    hf = "hf"
    nanochat = "nanochat"


def convert_command(
    source: Annotated[str, typer.Argument(help="Run, step, Hugging Face or nanochat checkpoint directory.")],
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    to: Annotated[Layout, typer.Option(help="hf: what from_pretrained loads; nanochat: model_*.pt and meta_*.json.")],
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored.")] = None,
) -> None:
    """Convert a checkpoint: nanochat's to Hugging Face's layout and back."""
    from nanoworks.api import load
    from nanoworks.checkpoint import save_checkpoint
    from nanoworks.checkpoint.nanochat import export_nanochat
    from nanoworks.common.errors import UserError

    if out.exists():
        raise UserError(f"{out} exists already; choose another --out")
    loaded = load(source, device="cpu", dtype=dtype)
    if to is Layout.nanochat:
        step = int(loaded.checkpoint.metadata.get("step", 0))
        export_nanochat(loaded.model, loaded.checkpoint.tokenizer, out, step=step)
    else:
        metadata = {**loaded.checkpoint.metadata, "parent": str(loaded.checkpoint.path)}
        with save_checkpoint(out, loaded.model, loaded.checkpoint.tokenizer, metadata=metadata):
            pass
    print(f"wrote {out}")
