"""The engine's settings and the size of its KV cache."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from nanoworks.common.device import memory_bytes
from nanoworks.common.errors import UserError
from nanoworks.config.base import Frozen
from nanoworks.engine.block_manager import blocks_in_sight
from nanoworks.nn import kernels
from nanoworks.nn.kernel_context import BLOCK_SIZE, suits
from nanoworks.nn.paged import KVShape


class EngineConfig(Frozen):
    block_size: int = Field(
        default=0, ge=0, description="tokens in a block of the KV cache; 0: 8 where the CPU kernels run, 16 elsewhere"
    )
    num_blocks: int | None = Field(default=None, gt=0, description="of the KV cache; wins over kv_memory")
    kv_memory: float | None = Field(
        default=None,
        gt=0,
        description="GiB for the KV cache; null: max_num_seqs full contexts, or what their windows hold of them, "
        "or a quarter of the memory if less",
    )
    max_num_seqs: int = Field(default=64, gt=0, description="sequences in a step")
    max_batch_tokens: int = Field(default=2048, gt=0, description="tokens in a step")
    max_queue: int = Field(default=1024, gt=0, description="requests that may wait in a server; more are refused")
    prefix_caching: bool = Field(
        default=True, description="keep the KV blocks of past requests for those that begin alike; not with windows"
    )
    quantize: Literal["int8", "int4"] | None = Field(
        default=None, description="round the weights when the model is loaded; null keeps them as they are"
    )
    kv_dtype: Literal["auto", "int8"] = Field(
        default="auto", description="of the KV cache: that of the model, or bytes with a scale for each token and head"
    )
    batch_invariant: bool = Field(
        default=False,
        description="refuse to run where a request's result may depend on what else runs: on the CPU kernels the bits "
        "are always the same, elsewhere the last ones may differ",
    )
    cuda_graphs: bool = Field(
        default=True, description="replay decoding steps as CUDA graphs; not with tensor_parallel"
    )
    tensor_parallel: int = Field(default=1, gt=0, description="processes that a model is spread over, a GPU each")
    tools: bool = Field(default=True, description="run the calculator when the model calls it")
    speculate: Literal["none", "ngram", "draft", "medusa"] = Field(
        default="none", description="where drafted tokens come from: the text itself, a small model, or Medusa heads"
    )
    draft_model: str | None = Field(
        default=None, description="of speculate=draft the model, of medusa the run that holds the heads"
    )
    max_draft: int = Field(default=8, gt=0, le=64, description="tokens drafted at most; fewer where that is faster")
    typical_acceptance: bool = Field(
        default=False,
        description="accept drafted tokens that are likely enough: more of them, but NOT exact; without tools",
    )

    def check(self) -> None:
        """Raise UserError where settings contradict each other."""
        if self.batch_invariant and self.typical_acceptance:
            raise UserError(
                "typical_acceptance depends on what was guessed, batch_invariant promises that nothing does"
            )
        if self.batch_invariant and self.tensor_parallel > 2:
            raise UserError("the order of sums over more than two processes is not fixed; with batch_invariant use two")
        if self.batch_invariant and self.speculate == "medusa":
            raise UserError(
                "speculate=medusa guesses several tokens for one place, which changes the order of sums; with "
                "batch_invariant use ngram or draft"
            )

    def for_device(self, shape: KVShape, device: torch.device) -> EngineConfig:
        """These settings with a block size, for a model of `shape` on `device`."""
        if self.block_size:
            return self
        kernel = device.type == "cpu" and suits(shape, BLOCK_SIZE) and kernels.available()
        return self.model_copy(update={"block_size": BLOCK_SIZE if kernel else 16})

    def cache_blocks(self, shape: KVShape, context: int, device: torch.device) -> int:
        """Number of usable blocks for a model of `shape` whose sequences have at most `context` tokens."""
        if self.num_blocks is not None:
            return self.num_blocks
        token_bytes = shape.bytes_per_token_int8 if self.kv_dtype == "int8" else shape.bytes_per_token
        block_bytes = token_bytes * self.block_size
        if self.kv_memory is not None:
            blocks = int(self.kv_memory * 2**30) // block_bytes
            if blocks == 0:
                raise UserError(
                    f"kv_memory={self.kv_memory} GiB holds no block of {block_bytes} bytes; give more memory"
                )
            return blocks
        wanted = -(-context // self.block_size)
        if shape.window is not None and not shape.window.token_ids:
            chunk = min(shape.window.size, self.max_batch_tokens)
            wanted = min(wanted, blocks_in_sight(shape.window, chunk, self.block_size))
        ranks = self.tensor_parallel if device.type == "cpu" else 1  # these share the memory
        memory = memory_bytes(device) // 4 // ranks
        return max(1, min(self.max_num_seqs * wanted, memory // block_bytes))
