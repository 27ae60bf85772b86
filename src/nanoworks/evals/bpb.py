"""Bits per byte: how well a model predicts text, whatever its vocabulary.

The loss of a token says little by itself, because tokenizers cut text into more or fewer tokens; per byte of
text it compares. Special tokens are no text: neither their loss nor their (zero) bytes count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from pydantic import Field

from nanoworks.common.errors import UserError
from nanoworks.config.base import Frozen
from nanoworks.data import Batch, Loader, build_source
from nanoworks.models import Decoder
from nanoworks.nn.context import DenseContext
from nanoworks.tokenizer import Tokenizer


class BpbOptions(Frozen):
    """What to measure on when no trainer hands over its validation data."""

    path: str | None = Field(
        default=None, description="text, .jsonl or .parquet, all of it; null: the validation split of stdlib"
    )
    tokens: int = Field(default=262_144, gt=0)
    sequence_length: int | None = Field(default=None, gt=1, description="null: the model's, but at most 2048")
    batch_size: int = Field(default=4, gt=0)


@torch.no_grad()
def bits_per_byte(
    model: Decoder,
    batches: Iterable[Batch],
    token_bytes: Sequence[int],
    device: torch.device | str,
    *,
    max_tokens: int | None = None,
) -> dict[str, float]:
    """Return {"bpb", "loss", "tokens"} over `batches`, stopping after the one that reaches `max_tokens`.

    `token_bytes` is `Tokenizer.token_bytes()`: bytes per id, 0 for a special token. `loss`, in nats, is the
    mean over all supervised targets (a weight above 0), special tokens included; `tokens` is their number.

    Raises:
        UserError: no batch, or no supervised byte in them.
    """
    lengths = torch.tensor(token_bytes, device=device)
    total_nats = text_nats = 0.0  # over the batches in Python's float64, where rounding is no matter
    tokens = text_bytes = 0
    for batch in batches:
        batch = batch.to(device)
        hidden = model(batch.tokens, DenseContext(batch.tokens, documents=batch.documents))
        supervised = batch.weights > 0
        targets = batch.targets[supervised]
        nats = -model.head.logprobs(hidden[supervised], targets)
        target_bytes = lengths[targets]
        total_nats += nats.sum().item()
        text_nats += nats[target_bytes > 0].sum().item()
        tokens += len(targets)
        text_bytes += int(target_bytes.sum())
        if max_tokens is not None and tokens >= max_tokens:
            break
    if text_bytes == 0:
        raise UserError("no text to validate on: the validation data is empty; give a larger val split")
    return {
        "bpb": text_nats / (math.log(2) * text_bytes),
        "loss": total_nats / tokens,
        "tokens": float(tokens),
    }


def text_bits_per_byte(model: Decoder, tokenizer: Tokenizer, options: BpbOptions) -> dict[str, float]:
    """Return `bits_per_byte` of the text that `options` name, its documents one after the other."""
    longest = options.sequence_length or min(model.config.max_position_embeddings, 2048)
    if options.path is None:
        source = build_source("stdlib", {"split": "val"})
    else:
        kind = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}.get(Path(options.path).suffix, "text")
        source = build_source(kind, {"split": "all", "path": options.path}, where="bpb")
    with Loader(
        source,
        tokenizer,
        sequence_length=longest,
        batch_size=options.batch_size,
        packing="stream",  # the other kinds leave out the ends of long documents
        documents=False,
        loss_on="all",
        infinite=False,
    ) as loader:
        return bits_per_byte(
            model,
            loader,
            tokenizer.token_bytes(),
            model.embed_tokens.weight.device,
            max_tokens=options.tokens,
        )
