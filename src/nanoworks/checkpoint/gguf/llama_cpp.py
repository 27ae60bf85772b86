"""A GGUF file through llama.cpp, to see that it means there what it means here.

Needs the package xllamacpp, llama.cpp's server as a Python object. Keys and values are kept in float32, so that only
llama.cpp's products in the file's own dtype differ from ours.
"""

from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import httpx
import torch
from torch import Tensor

from nanoworks.common.errors import UserError, missing_extra

TOP = 512
"""So many of the likeliest tokens are asked for at each position: the server's answers are JSON."""


def installed() -> bool:
    return find_spec("xllamacpp") is not None


class LlamaCpp:
    """A loaded GGUF file."""

    def __init__(self, path: Path, *, context: int = 512) -> None:
        """`context`: the longest sequence to come, in tokens.

        Raises:
            UserError: llama.cpp cannot load the file (its own words are on standard error), or is not installed.
        """
        try:
            import xllamacpp
        except ImportError:
            raise missing_extra("xllamacpp", "gguf") from None
        self.reader = f"llama.cpp (xllamacpp {metadata.version('xllamacpp')})"
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = params.n_batch = params.n_ubatch = context
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.warmup = params.fit_params = False
        params.no_extra_bufts = True  # those are a second copy of the weights, laid out for speed
        params.cache_ram_mib = 0  # no memory of earlier prompts
        params.verbosity = 0
        try:
            self._server = xllamacpp.Server(params)
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"llama.cpp cannot load {path}: {error}") from None
        self._letter = self.encode("a")[0]

    def log_probabilities(self, tokens: Tensor, first: int = 0) -> Tensor:
        """(B, T) ids -> (B, T - first, n) log-probabilities after each position from `first` on.

        n is one more than the largest id seen; -inf where a token is not among the `TOP` likeliest.
        """
        rows = [[self._likeliest(row[: t + 1]) for t in range(first, len(row))] for row in tokens.tolist()]
        size = 1 + max(id for row in rows for found in row for id in found)
        out = torch.full((len(rows), len(rows[0]), size), -torch.inf)
        for b, row in enumerate(rows):
            for t, found in enumerate(row):
                out[b, t, list(found)] = torch.tensor(list(found.values()))
        return out

    def _likeliest(self, ids: list[int]) -> dict[int, float]:
        # The server reports what the model says before sampling, but only with a token whose text is complete: so
        # one that always is, is forced.
        forced = [[self._letter, 1e9]]
        answer = self._server.handle_completions(
            {
                "prompt": ids,
                "n_predict": 1,
                "temperature": 0.0,
                "n_probs": TOP,
                "logit_bias": forced,
                "cache_prompt": True,
            }
        )
        if "choices" not in answer:
            raise UserError(f"llama.cpp refuses a prompt of {len(ids)} tokens: {answer}")
        (position,) = answer["choices"][0]["logprobs"]["content"]
        return {entry["id"]: entry["logprob"] for entry in position["top_logprobs"]}

    def generate(self, ids: list[int], count: int) -> list[int]:
        """The `count` ids that follow `ids` greedily; an end of text does not end it."""
        made: list[int] = []
        for _ in range(count):
            likeliest = self._likeliest([*ids, *made])
            made.append(max(likeliest, key=likeliest.__getitem__))
        return made

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special tokens spelled out in it are text, and none is added."""
        content = {"content": text, "add_special": False, "parse_special": False}
        return list(httpx.post(f"{self._server.listening_address}/tokenize", json=content).json()["tokens"])
