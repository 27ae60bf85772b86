"""The memory that training is refused by, beside what it takes: `python benchmarks/memory.py`.

Each shape trains two steps in a process of its own; its peak resident memory stands beside the estimate of
`nanoworks.train.memory` that `nanoworks train` checks before it starts. On a CPU only.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys

import torch

from nanoworks.common.allocator import keep_freed_memory
from nanoworks.models import build_model, config_from_dict
from nanoworks.nn.context import DenseContext
from nanoworks.nn.linear import set_compute_dtype
from nanoworks.parallel import SingleDevice
from nanoworks.train.memory import estimate_memory
from nanoworks.train.optim import MuonAdamW

SHAPES = [  # depth, vocabulary, tokens a row, rows, dtype, activation checkpointing
    (4, 4096, 512, 4, "float32", False),
    (4, 4096, 512, 32, "float32", False),
    (8, 32768, 1024, 4, "float32", False),
    (8, 32768, 1024, 4, "bfloat16", False),
    (8, 32768, 2048, 4, "bfloat16", False),
    (12, 65536, 1024, 1, "bfloat16", False),
    (12, 32768, 2048, 2, "float32", True),
]


def measure(depth: int, vocab: int, T: int, rows: int, dtype_name: str, checkpointing: bool) -> None:
    """Train two steps and print the row of the table."""
    keep_freed_memory()
    dtype, device = getattr(torch, dtype_name), torch.device("cpu")
    config = {"model_type": "nanochat", "depth": depth, "vocab_size": vocab, "max_position_embeddings": T}
    strategy = SingleDevice(device, activation_checkpointing=checkpointing)
    model = strategy.prepare(build_model(config_from_dict(config)))
    model.init_weights()
    set_compute_dtype(model, None if dtype == torch.float32 else dtype)
    optimizer = MuonAdamW(model.param_groups(), MuonAdamW.Options())
    tokens = torch.randint(0, vocab, (rows, T))
    for step in range(2):
        optimizer.zero_grad()
        loss = model.head.loss(model(tokens, DenseContext(tokens)), tokens, torch.ones(tokens.shape))
        strategy.backward(loss / tokens.numel())
        strategy.clip(model, 1.0)
        strategy.step(optimizer, 1.0, step)
    estimate = estimate_memory(
        model,
        sequence_length=T,
        dtype=dtype,
        device=device,
        activation_checkpointing=checkpointing,
        matrix_state_bytes=MuonAdamW.matrix_state_bytes,
    ).total(rows)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    how = dtype_name + (", checkpointed" if checkpointing else "")
    figures = f"{peak / 2**30:.2f} | {estimate / 2**30:.2f} | {estimate / peak:.2f}"
    print(f"| {depth} | {vocab} | {rows} x {T} | {how} | {figures} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, help="only this one of the list, in this process")
    args = parser.parse_args()
    if args.shape is not None:
        measure(*SHAPES[args.shape])
        return
    print("| depth | vocabulary | batch | precision | peak GiB | estimate GiB | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for i in range(len(SHAPES)):  # a process each: peak memory never falls
        subprocess.run([sys.executable, __file__, "--shape", str(i)], check=True)


if __name__ == "__main__":
    main()
