"""The engine's settings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from nanoworks.common.errors import UserError
from nanoworks.config.base import Frozen


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
    max_batch_tokens: int = Field(
        default=2048,
        ge=0,
        description="tokens in a step; 0: 128 on a CPU, so that nobody waits long for one, else 2048",
    )
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
