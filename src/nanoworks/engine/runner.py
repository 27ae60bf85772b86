"""Runs the model over a batch: the only part of the engine that holds the KV cache and calls the model."""

from __future__ import annotations

import torch
from torch import Tensor

from nanoworks.engine.batch import Batch
from nanoworks.models.decoder import Decoder
from nanoworks.nn.paged import KVCache, KVShape, PagedContext


class Runner:
    """Args: `model` is used as it is at each step, so its weights may change between steps."""

    def __init__(self, model: Decoder, shape: KVShape, *, num_blocks: int, block_size: int) -> None:
        self.model = model
        self.device = model.embed_tokens.weight.device
        self.cache = KVCache(shape, num_blocks, block_size, self.device)

    def run(self, batch: Batch) -> Tensor:
        """Return the hidden states (N, hidden_size) of the batch, and leave its keys and values in the cache."""
        self.cache.apply(batch.changes.copies, batch.changes.fresh)
        context = PagedContext(
            self.cache,
            tokens=batch.tokens,
            positions=batch.positions,
            prev_tokens=batch.prev_tokens,
            slots=batch.slots,
            block_tables=batch.block_tables,
            block_counts=batch.block_counts,
            block_places=batch.block_places,
            query_lengths=batch.query_lengths,
            context_lengths=batch.context_lengths,
        )
        return self.model(batch.tokens, context)

    def logits(self, hidden: Tensor, rows: list[int]) -> Tensor:
        """Return the logits (len(rows), vocab_size) float32 after the given rows of `hidden`."""
        return self.model.head(hidden[torch.tensor(rows, device=hidden.device)])
