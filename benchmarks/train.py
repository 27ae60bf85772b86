"""Training speed on a CPU: nanoworks beside `plain` and beside the limit of matrix multiplication.

    python benchmarks/train.py [--rounds N] [--threads N]

Both sides train the same model (depth 4, width 256, vocabulary 4096) on the same 4 rows of 512 tokens, eager, in
turns within one process, so that they meet the same load on the machine; figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from plain import plain_step

from nanoworks.models import build_model, config_from_dict
from nanoworks.nn.context import DenseContext
from nanoworks.nn.linear import set_compute_dtype
from nanoworks.nn.onednn import matmul_nt
from nanoworks.train.optim import MuonAdamW

DEPTH, DIM, HEADS, VOCAB, T, B = 4, 256, 2, 4096, 512, 4


def our_step(tokens, targets, dtype):
    config = config_from_dict(dict(model_type="nanochat", depth=DEPTH, vocab_size=VOCAB, max_position_embeddings=T))
    model = build_model(config)
    model.init_weights()
    set_compute_dtype(model, None if dtype == torch.float32 else dtype)
    optimizer = MuonAdamW(model.param_groups(), MuonAdamW.Options())
    weights = torch.ones(targets.shape)
    count = weights.sum()
    from nanoworks.parallel import SingleDevice; strategy = SingleDevice(torch.device("cpu"))
    def step():
        hidden = model(tokens, DenseContext(tokens))
        loss = model.head.loss(hidden, targets, weights) / count
        loss.backward()
        strategy.clip(model, 1.0)
        optimizer.step(1.0, 0)
        optimizer.zero_grad()
        return loss.item()
    step.model = model
    return step


def interleave(sides, rounds, n=2):
    times = {k: [] for k in sides}
    for s in sides.values():
        s(), s()
    for _ in range(rounds):
        for k, s in sides.items():
            w, c = time.perf_counter(), time.process_time()
            for _ in range(n):
                s()
            times[k].append(((time.perf_counter() - w) / n, (time.process_time() - c) / n))
    return times


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS","2")))
    torch.manual_seed(0)
    tokens, targets = torch.randint(0, VOCAB, (2, B, T))
    ours = {d: our_step(tokens, targets, d) for d in (torch.float32, torch.bfloat16)}
    plain = {d: plain_step(tokens, targets, depth=DEPTH, dim=DIM, heads=HEADS, vocab_size=VOCAB, dtype=d) for d in ours}
    for d in ours:
        t = interleave({"plain": plain[d], "ours": ours[d]}, 5)
        for k, v in t.items():
            w, c = (statistics.median(x[i] for x in v) for i in (0, 1))
            print(d, k, f"{w*1e3:.1f} ms {B*T/w:.0f} tok/s {B*T/c:.0f} tok/cpus", flush=True)
        print("ratio", [f"{statistics.median(a[i]/b[i] for a,b in zip(t['plain'],t['ours'])):.2f}" for i in (0,1)])
