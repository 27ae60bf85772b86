"""transformers: `generate`, for many requests as one padded batch that runs until the longest is done.

Its tokens beyond what a request asked for are not counted. Its own continuous batching (`generate_batch`) was slower
on a CPU wherever it was tried.
"""

from __future__ import annotations

import torch
import transformers
from transformers import AutoModelForCausalLM


class Adapter:
    def __init__(self, model: str, precision: str, threads: int) -> None:
        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        assert precision == "bf16"
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0
        self.about = f"transformers {transformers.__version__}, torch {torch.__version__}"

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], counts: list[int]) -> list[list[int]]:
        longest, count = max(map(len, prompts)), max(counts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, longest - len(prompt) :] = torch.tensor(prompt)
            mask[i, longest - len(prompt) :] = 1
        out = self._model.generate(
            ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False
        )
        return [row[longest : longest + n].tolist() for row, n in zip(out, counts, strict=True)]
