"""Runs the model over a batch: the only part of the engine that holds the KV cache and calls the model.

What a runner does with a model depends on where it is: on a CPU that has them, the kernels of `nn.kernels`, for which
the weights are packed (and quantized, if asked) once; elsewhere the model as it is.
"""

from __future__ import annotations

import logging
from typing import cast

import torch
from torch import Tensor

from nanoworks.common.errors import UserError
from nanoworks.engine.batch import Batch
from nanoworks.models.decoder import Decoder
from nanoworks.nn import kernels
from nanoworks.nn.kernel_context import KernelCache, KernelContext, suits
from nanoworks.nn.pack import pack
from nanoworks.nn.paged import KVCache, KVShape, PagedContext
from nanoworks.nn.quantized import Precision, quantize_leaves

_log = logging.getLogger(__name__)


class Runner:
    """Args:
    model: as loaded. With the kernels it is copied; see `refresh`.
    quantize: round the weights of its linear leaves.
    kv_int8: keep keys and values in bytes.
    """

    def __init__(
        self,
        model: Decoder,
        shape: KVShape,
        *,
        num_blocks: int,
        block_size: int,
        quantize: Precision | None = None,
        kv_int8: bool = False,
    ) -> None:
        self.device = model.embed_tokens.weight.device
        self._source, self._quantize = model, quantize
        self.uses_kernels = self.device.type == "cpu" and suits(shape, block_size) and kernels.available()
        if kv_int8 and not self.uses_kernels:
            reason = kernels.why_not() if self.device.type == "cpu" else "they are for a CPU"
            raise UserError(f"keys and values in int8 need the CPU kernels ({reason}); leave kv_dtype at auto")
        self.cache: KernelCache | KVCache
        if self.uses_kernels:
            self.cache = KernelCache(shape, num_blocks, int8=kv_int8)
        else:
            self.cache = KVCache(shape, num_blocks, block_size, self.device)
        self.refresh()

    def refresh(self) -> None:
        """Take the weights of the model again, after they were changed in place."""
        if self.uses_kernels:
            self.model = cast(Decoder, pack(self._source, quantize=self._quantize))
        elif self._quantize is not None:
            self.model = cast(Decoder, quantize_leaves(self._source, self._quantize))
        else:
            self.model = self._source

    def run(self, batch: Batch) -> Tensor:
        """Return the hidden states (N, hidden_size) of the batch, and leave its keys and values in the cache."""
        changes = batch.changes
        self.cache.apply(changes.copies, changes.fresh, changes.moves)
        if isinstance(self.cache, KernelCache):
            return self.model(batch.tokens, KernelContext(self.cache, batch))
        return self.model(batch.tokens, PagedContext(self.cache, batch))

    def logits(self, hidden: Tensor, rows: list[int]) -> Tensor:
        """Return the logits (len(rows), vocab_size) float32 after the given rows of `hidden`."""
        if len(rows) < len(hidden) or rows != list(range(len(rows))):
            hidden = hidden[torch.tensor(rows, device=hidden.device)]
        return self.model.head(hidden)
