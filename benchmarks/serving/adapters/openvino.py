"""OpenVINO GenAI: `ContinuousBatchingPipeline` for many requests and `LLMPipeline` for one: where each is faster."""

from __future__ import annotations

from typing import Any

import numpy as np


class Adapter:
    def __init__(self, model: str, precision: str, threads: int) -> None:
        import openvino
        import openvino_genai as genai

        self._tensor, self._genai = openvino.Tensor, genai
        properties = {"INFERENCE_NUM_THREADS": threads}
        self._one = genai.LLMPipeline(model, "CPU", **properties)
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = 1
        scheduler.max_num_seqs = 16
        scheduler.max_num_batched_tokens = 2048
        scheduler.dynamic_split_fuse = True
        self._many = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)
        self.about = f"openvino-genai {genai.__version__}"

    def _config(self, count: int) -> Any:
        config = self._genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = count
        config.ignore_eos, config.do_sample = True, False
        return config

    def generate(self, prompts: list[list[int]], counts: list[int]) -> list[list[int]]:
        inputs = [self._tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        if len(prompts) == 1:
            mask = self._tensor(np.ones((1, len(prompts[0])), dtype=np.int64))
            result = self._one.generate(self._genai.TokenizedInputs(inputs[0], mask), self._config(counts[0]))
            return [list(result.tokens[0])]
        results = self._many.generate(inputs, [self._config(n) for n in counts])
        return [list(result.m_generation_ids[0]) for result in results]
