"""llama.cpp through the C interface that llama-cpp-python exposes, compiled for this processor.

Batched decoding as llama.cpp's own server does it: all prompts in batches, then a token of every unfinished sequence
in each call, one KV cache for all (`kv_unified`, which mixed lengths need).
"""

from __future__ import annotations

import ctypes

import llama_cpp as lc
import numpy as np
from workload import CONTEXT, VOCAB

SEQUENCES, BATCH = 16, 2048


class Adapter:
    def __init__(self, model: str, precision: str, threads: int) -> None:
        self._log = lc.llama_log_callback(lambda level, text, data: None)  # referenced for as long as it is in use
        lc.llama_log_set(self._log, None)
        lc.llama_backend_init()
        self._model = lc.llama_model_load_from_file(
            f"{model}/{precision}.gguf".encode(), lc.llama_model_default_params()
        )
        params = lc.llama_context_default_params()
        params.n_ctx = SEQUENCES * CONTEXT // 2
        params.n_batch, params.n_ubatch, params.n_seq_max = BATCH, 512, SEQUENCES
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = lc.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.kv_unified = True
        self._context = lc.llama_init_from_model(self._model, params)
        assert self._context, "llama.cpp could not make a context"
        self._memory = lc.llama_get_memory(self._context)
        self._batch = lc.llama_batch_init(BATCH, 0, 1)
        features = [part.split(" = ")[0].strip() for part in lc.llama_print_system_info().decode().split("|")[1:]]
        self.about = f"llama-cpp-python {lc.__version__}:{' '.join(f for f in features if '512' in f or 'REPACK' in f)}"

    def generate(self, prompts: list[list[int]], counts: list[int]) -> list[list[int]]:
        lc.llama_memory_clear(self._memory, False)
        outputs: list[list[int]] = [[] for _ in prompts]
        entries = [
            (token, position, i, position == len(prompt) - 1)
            for i, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        while entries:
            for start in range(0, len(entries), BATCH):
                for i, token in self._decode(entries[start : start + BATCH]):
                    outputs[i].append(token)
            entries = [
                (output[-1], len(prompts[i]) + len(output) - 1, i, True)
                for i, output in enumerate(outputs)
                if len(output) < counts[i]
            ]
        return outputs

    def _decode(self, entries: list[tuple[int, int, int, bool]]) -> list[tuple[int, int]]:
        """Take (token, position, sequence, wanted) in; return (sequence, next token) where it is wanted."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for row, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[row], batch.pos[row], batch.logits[row] = token, position, wanted
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
        status = lc.llama_decode(self._context, batch)
        assert status == 0, f"llama_decode: {status}"
        found = []
        for row, (_, _, sequence, wanted) in enumerate(entries):
            if wanted:
                logits = lc.llama_get_logits_ith(self._context, row)
                found.append((sequence, int(np.ctypeslib.as_array(logits, (VOCAB,)).argmax())))
        return found


def quantize(source: str, target: str, kind: str, threads: int) -> None:
    """Write the GGUF file `source` as `target` in `kind`, "q8_0" or "q4_0", by llama.cpp's own quantizer."""
    params = lc.llama_model_quantize_default_params()
    params.nthread = threads
    params.ftype = {"q8_0": lc.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": lc.LLAMA_FTYPE_MOSTLY_Q4_0}[kind]
    status = lc.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
    assert status == 0, f"llama_model_quantize: {status}"
