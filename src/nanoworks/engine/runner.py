"""Runs the model over a batch: the only part of the engine that holds the KV cache and calls the model.

What a runner does with a model depends on where it is: on a CPU that has them, the kernels of `nn.kernels`, for which
the weights are packed (and quantized, if asked) once; on a GPU the Triton kernel, fused projections and CUDA graphs, if
the kernel runs there; elsewhere the model as it is.
"""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
from torch import Tensor

from nanoworks.common.errors import UserError
from nanoworks.engine.batch import Batch
from nanoworks.engine.block_manager import blocks_in_sight
from nanoworks.engine.cuda_graphs import DecodeGraphs
from nanoworks.models.decoder import Decoder
from nanoworks.nn import kernels
from nanoworks.nn.context import Window
from nanoworks.nn.fused import fuse
from nanoworks.nn.kernel_context import KernelCache, KernelContext, suits
from nanoworks.nn.pack import pack
from nanoworks.nn.paged import KVCache, KVShape, PagedContext
from nanoworks.nn.paged_inputs import PagedInputs
from nanoworks.nn.quantized import Precision, quantize_leaves
from nanoworks.nn.triton_context import TritonContext, why_not

_log = logging.getLogger(__name__)


class Runner:
    """Args:
    model: as loaded. With the kernels it is copied; see `refresh`.
    quantize: round the weights of its linear leaves.
    kv_int8: keep keys and values in bytes.
    consume: the caller gives the model away: with the kernels it is packed in place, each weight freed once it is done.
    graph_rows: replay steps of up to so many sequences with one token each as CUDA graphs, where that is possible.
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
        consume: bool = False,
        graph_rows: int = 0,
    ) -> None:
        self.device = model.embed_tokens.weight.device
        self._source, self._quantize = model, quantize
        self.uses_kernels = self.device.type == "cpu" and suits(shape, block_size) and kernels.available()
        if kv_int8 and not self.uses_kernels:
            reason = kernels.why_not() if self.device.type == "cpu" else "they are for a CPU"
            raise UserError(f"keys and values in int8 need the CPU kernels ({reason}); leave kv_dtype at auto")
        self.cache: KernelCache | KVCache
        if self.uses_kernels:
            windows = (getattr(module, "window", None) for module in model.modules())
            named = any(isinstance(window, Window) and window.token_ids for window in windows)
            self.cache = KernelCache(shape, num_blocks, int8=kv_int8, windows_name_tokens=named)
        else:
            # One more than anybody knows of: what a graph's padding writes goes there.
            self.cache = KVCache(shape, num_blocks + bool(graph_rows), block_size, self.device)
        self._context = self._choose_context(shape)
        self._graphs: DecodeGraphs | None = None
        if isinstance(self.cache, KVCache) and self._context is TritonContext and graph_rows:
            self.cache.apply([], [num_blocks])
            self._graphs = DecodeGraphs(
                max_rows=graph_rows,
                table_width=_table_width(shape.window, model.config.max_position_embeddings, block_size),
                block_size=block_size,
                scratch_block=num_blocks,
                windowed=shape.window is not None,
                device=self.device,
            )
        self._take_weights(consume)

    def refresh(self) -> None:
        """Take the weights of the model again, after they were changed in place."""
        self._take_weights(consume=False)

    def _take_weights(self, consume: bool) -> None:
        if self.uses_kernels:
            self.model = cast(Decoder, pack(self._source, quantize=self._quantize, consume=consume))
        elif self._quantize is not None:
            self.model = cast(Decoder, quantize_leaves(self._source, self._quantize))
        else:
            self.model = cast(Decoder, fuse(self._source)) if self.device.type == "cuda" else self._source
        if self._graphs is not None:
            self._graphs.clear()

    def run(self, batch: Batch) -> Tensor:
        """Return the hidden states (N, hidden_size) of the batch, and leave its keys and values in the cache."""
        changes = batch.changes
        self.cache.apply(changes.copies, changes.fresh, changes.moves)
        hidden = None if self._graphs is None else self._graphs.run(batch, self._forward)
        return self._forward(batch) if hidden is None else hidden

    def _forward(self, inputs: PagedInputs) -> Tensor:
        return self.model(inputs.tokens, self._context(self.cache, inputs))

    def _choose_context(self, shape: KVShape) -> Any:
        """The class of the contexts, which takes (cache, inputs)."""
        if self.uses_kernels:
            return KernelContext
        if self.device.type != "cuda":
            return PagedContext
        config = self._source.config
        reason = why_not(shape, config.num_attention_heads // config.num_key_value_heads, self.device)
        if reason:
            _log.warning("attention on this GPU runs in plain PyTorch, without CUDA graphs: %s", reason)
            return PagedContext
        _log.info("attention on this GPU runs as a Triton kernel")
        return TritonContext

    def logits(self, hidden: Tensor, rows: list[int]) -> Tensor:
        """Return the logits (len(rows), vocab_size) float32 after the given rows of `hidden`."""
        if len(rows) < len(hidden) or rows != list(range(len(rows))):
            hidden = hidden[torch.tensor(rows, device=hidden.device)]
        return self.model.head(hidden)


def _table_width(window: Window | None, context: int, block_size: int) -> int:
    """Blocks in the table of a sequence that is given one token more, at most."""
    whole = -(-context // block_size)
    if window is None or window.token_ids:
        return whole
    return min(whole, blocks_in_sight(window, 1, block_size))
