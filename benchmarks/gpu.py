"""Pretraining on this machine's accelerator: tokens/s, MFU, and memory against the estimate.

    python benchmarks/gpu.py                        # 200 steps of depth 12 (the figure in docs/performance.md)
    python benchmarks/gpu.py --depth 2 --steps 3    # a smoke test, on a CPU too

Text is the standard library of the running Python, tokenizer included, so nothing is downloaded. Serving is measured by
benchmarks/gpu_serving.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch

from nanoworks.common.device import choose_device, choose_dtype
from nanoworks.config import Recipe
from nanoworks.config.pipeline import TokenizerSection
from nanoworks.models import build_model, config_from_dict
from nanoworks.train.launch import launch
from nanoworks.train.memory import estimate_memory
from nanoworks.train.optim import MuonAdamW
from nanoworks.train.pipeline import prepare_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=16, help="rows of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=2, help="of a step")
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        prepare_tokenizer(
            TokenizerSection(vocab_size=args.vocab_size, data=[{"name": "stdlib"}]), Path(root) / "tokenizer"
        )
        recipe = Recipe(
            stage={"name": "pretrain"},
            run={"name": "bench", "root": root},
            tokenizer=f"{root}/tokenizer",
            model={"model_type": "nanochat", "depth": args.depth},
            hardware={"compile": args.compile},
            data={"sequence_length": args.sequence_length, "train": [{"name": "stdlib"}], "packing": "stream"},
            train={
                "length": f"{args.steps} steps",
                "tokens_per_step": args.rows * args.sequence_length * args.micro_batches,
                "micro_batch_size": args.rows,
            },
        )
        run = launch(recipe).run
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    settled = [r for r in rows if "train/mfu" in r][len(rows) // 10 :]
    median = {k: statistics.median(r[k] for r in settled) for k in ("train/tokens_per_second", "train/mfu")}
    device = choose_device()
    dtype = choose_dtype("auto", device)
    with torch.device("meta"):
        model = build_model(
            config_from_dict({"model_type": "nanochat", "depth": args.depth, "vocab_size": args.vocab_size})
        )
    estimate = estimate_memory(
        model,
        sequence_length=args.sequence_length,
        dtype=dtype,
        device=device,
        activation_checkpointing="none",
        matrix_state_bytes=MuonAdamW.matrix_state_bytes,
    ).total(args.rows)
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    print(f"{name}, {dtype}, depth {args.depth}, {args.rows} x {args.sequence_length}, compile {args.compile}")
    print(f"tokens/s    {median['train/tokens_per_second']:,.0f}")
    print(f"MFU         {median['train/mfu']:.1%}")
    print(f"memory      {max(r['train/memory_gib'] for r in settled):.2f} GiB, estimated {estimate / 2**30:.2f} GiB")
    print(f"loss        {rows[0]['train/loss']:.3f} -> {settled[-1]['train/loss']:.3f}")


if __name__ == "__main__":
    main()
