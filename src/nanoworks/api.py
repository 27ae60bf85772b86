"""The Python face of nanoworks: load a model from anywhere and use it.

m = nanoworks.load("runs/sft")
m.chat("What is 12 times 7?")
m.generate("The capital of", max_tokens=16)
m.logits([[1, 2, 3]])
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanoworks.checkpoint import Checkpoint, load_checkpoint
from nanoworks.common.device import choose_device
from nanoworks.common.errors import UserError
from nanoworks.config.model import ModelConfig
from nanoworks.engine import Engine, EngineConfig, SamplingParams, Workers
from nanoworks.models import Decoder
from nanoworks.nn.context import DenseContext
from nanoworks.tokenizer import Tokenizer


def load(
    path: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    tensor_parallel: int = 1,
) -> LoadedModel:
    """Load a run, a step, a Hugging Face directory or hub id, or a nanochat checkpoint directory.

    Args:
        path: where it is. Weights that need no change stay in its files, which must not be written to from now on;
            what is written to them here stays here.
        device: default: the best that works here.
        dtype: of the weights, e.g. "bfloat16"; default: as stored.
        tensor_parallel: processes to spread the model over, a GPU each or sharing the CPU's threads; they end with
            `close`, or with this process.
    """
    place = choose_device(str(device) if device is not None else "auto")
    if tensor_parallel == 1:
        return LoadedModel(load_checkpoint(path, device=place, dtype=_dtype(dtype), mapped=True))
    workers = Workers(tensor_parallel, place)
    try:
        return LoadedModel(workers.load(path, dtype=_dtype(dtype)), workers)
    except BaseException:
        workers.close()
        raise


class LoadedModel:
    """A model with its tokenizer, ready to compute logits, complete text and chat."""

    def __init__(self, checkpoint: Checkpoint, workers: Workers | None = None) -> None:
        self.checkpoint, self.workers = checkpoint, workers
        self.model: Decoder = checkpoint.model
        self._engine: Engine | None = None
        self._given_away = False

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def tokenizer(self) -> Tokenizer:
        if self.checkpoint.tokenizer is None:
            raise UserError(f"{self.checkpoint.path} has no tokenizer; put tokenizer.json beside config.json")
        return self.checkpoint.tokenizer

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @torch.inference_mode()
    def logits(self, token_ids: Tensor | Sequence[Sequence[int]]) -> Tensor:
        """(B, T) ids -> (B, T, vocab_size) float32 logits."""
        self._check_kept()
        if self.workers is not None:
            raise UserError("logits needs the whole model here; load it without tensor_parallel")
        tokens = torch.as_tensor(token_ids, dtype=torch.long, device=self.device)
        if tokens.ndim != 2:
            raise UserError(f"token_ids must be (batch, tokens), not of shape {tuple(tokens.shape)}")
        return self.model.head(self.model(tokens, DenseContext(tokens)))

    def engine(self, config: EngineConfig | None = None, *, text: bool = True, consume: bool = False) -> Engine:
        """A new engine over this model (a default one is kept for `generate` and `chat`).

        Args:
            text: False needs no tokenizer and gives token ids only.
            consume: the model is for this engine alone, which may change it, and needs half the memory for that.
        """
        self._check_kept()
        self._given_away = consume
        config = config or EngineConfig()
        if config.speculate == "medusa" and config.draft_model is None:  # the heads are beside the model
            config = config.model_copy(update={"draft_model": str(self.checkpoint.path)})
        if self.workers is not None:
            config = config.model_copy(update={"tensor_parallel": self.workers.size})
        return Engine(self.model, self.tokenizer if text else None, config, workers=self.workers, consume=consume)

    def _check_kept(self) -> None:
        if self._given_away:
            raise UserError("this model was given away to an engine; load it again")

    def close(self) -> None:
        """End the processes of a model that is spread over several; others need no closing."""
        if self.workers is not None:
            self.workers.close()

    def generate(self, prompt: str | Sequence[str], **sampling: Any) -> Any:
        """Continue raw text; keywords are those of `SamplingParams`. One prompt gives one string, a list a list;
        with n > 1 each becomes a list of n strings."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        texts = self._complete([self.tokenizer.encode(p, bos=True) for p in prompts], sampling)
        return texts[0] if isinstance(prompt, str) else texts

    def chat(self, conversation: str | Sequence[dict[str, Any]], **sampling: Any) -> Any:
        """Answer a question or a list of messages [{"role", "content"}, ...] that ends with the user's turn."""
        messages = [{"role": "user", "content": conversation}] if isinstance(conversation, str) else conversation
        ids = self.tokenizer.render_for_completion({"messages": list(messages)})
        return self._complete([ids], sampling)[0]

    def _complete(self, prompts: list[list[int]], sampling: dict[str, Any]) -> list[Any]:
        if self._engine is None:
            self._engine = self.engine()
        params = SamplingParams(**sampling)
        completions = self._engine.generate(prompts, params)
        return [group[0].text if params.n == 1 else [c.text for c in group] for group in completions]


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise UserError(f"unknown dtype {dtype!r}; try 'float32' or 'bfloat16'")
    return found
