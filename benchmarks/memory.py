"""The memory that training is refused by, beside what it takes: `python benchmarks/memory.py`.

Each shape trains two steps of two micro-batches in a process of its own. Its peak resident memory stands beside the
estimate of `nanoworks.train.memory`, which `nanoworks train` checks before it starts and `nanoworks plan` uses; the
bytes of its parameters, gradients and optimizer beside the estimate's. On a CPU only.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import torch

import nanoworks.train.launch  # noqa: F401  (its libraries are part of what a run takes)
from nanoworks.common.allocator import keep_freed_memory
from nanoworks.config import Recipe
from nanoworks.config.recipe import Checkpointing
from nanoworks.models import Decoder, build_model, config_from_dict
from nanoworks.nn.context import DenseContext
from nanoworks.nn.linear import set_compute_dtype
from nanoworks.parallel import SingleDevice, open_strategy
from nanoworks.parallel.mesh import Degrees, world_size
from nanoworks.parallel.shards import local
from nanoworks.train.memory import estimate_memory
from nanoworks.train.optim import AdamW, MuonAdamW
from nanoworks.train.plan import cluster, forecast, workload
from nanoworks.train.stage import Loss


def _nanochat(depth: int, vocab_size: int) -> dict[str, Any]:
    return {"model_type": "nanochat", "depth": depth, "vocab_size": vocab_size}


def _llama(hidden_size: int, layers: int, vocab_size: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": hidden_size * 8 // 3,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden_size // 64,
        "num_key_value_heads": hidden_size // 128,
        "vocab_size": vocab_size,
        "tie_word_embeddings": True,
        **more,
    }


_EXPERTS = {"model_type": "mixtral", "num_local_experts": 8, "tie_word_embeddings": False}
_OF_RANKS = 2
SHAPES = [  # name, model, tokens a row, rows, dtype, activation checkpointing
    ("nanochat, depth 8", _nanochat(8, 32768), 1024, 2, "float32", "none"),
    ("nanochat, depth 8", _nanochat(8, 32768), 1024, 4, "bfloat16", "none"),
    ("llama, 8 x 512", _llama(512, 8, 16384, intermediate_size=1408), 1024, 4, "float32", "none"),
    ("mixtral, 4 x 256", _llama(256, 4, 16384, **_EXPERTS), 512, 8, "float32", "none"),
    ("nanochat, depth 4", _nanochat(4, 4096), 512, 16, "float32", "none"),
    ("nanochat, depth 8", _nanochat(8, 32768), 2048, 2, "float32", "full"),
    ("llama, 12 x 768", _llama(768, 12, 32768), 512, 2, "bfloat16", "none"),
    ("mixtral, 6 x 384", _llama(384, 6, 16384, **_EXPERTS), 512, 8, "float32", "none"),
]


def measure(
    name: str, shape: dict[str, Any], T: int, rows: int, dtype_name: str, checkpointing: Checkpointing
) -> dict[str, Any]:
    """Train two steps and return the figures."""
    keep_freed_memory()
    dtype, device = getattr(torch, dtype_name), torch.device("cpu")
    strategy = SingleDevice(device, activation_checkpointing=checkpointing)
    model = strategy.prepare(build_model(config_from_dict({**shape, "max_position_embeddings": T})))
    model.init_weights()
    rule = AdamW if shape["model_type"] == "llama" else MuonAdamW
    estimate = estimate_memory(
        model,
        sequence_length=T,
        dtype=dtype,
        device=device,
        activation_checkpointing=checkpointing,
        matrix_state_bytes=rule.matrix_state_bytes,
    )
    set_compute_dtype(model, None if dtype == torch.float32 else dtype)
    optimizer = rule(model.param_groups(), rule.Options())
    tokens = torch.randint(0, shape["vocab_size"], (rows, T))
    for step in range(2):
        optimizer.zero_grad()
        for _ in range(2):
            loss = model.head.loss(model(tokens, DenseContext(tokens)), tokens, torch.ones(tokens.shape))
            (loss / tokens.numel()).backward()
        strategy.clip(model, 1.0)
        strategy.step(optimizer, 1.0, step)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    lasting = [*model.parameters(), *gradients, *optimizer.state_dict().values()]
    return {
        "name": name,
        "batch": f"{rows} x {T}",
        "how": dtype_name + ("" if checkpointing == "none" else f", {checkpointing} checkpointing"),
        "lasting": sum(t.numel() * t.element_size() for t in lasting),
        "lasting_estimate": estimate.lasting,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "estimate": estimate.total(rows),
    }


def measure_rank() -> dict[str, Any]:
    """On a rank that torchrun started: two steps of FSDP2; the figures of the fullest rank, on each."""
    keep_freed_memory()
    device, world = torch.device("cpu"), world_size()
    name, shape, T, rows, _, _ = SHAPES[_OF_RANKS]
    recipe = Recipe(
        stage={"name": "pretrain"},
        tokenizer="none",
        model={**shape, "max_position_embeddings": T},
        data={"sequence_length": T, "train": [{"name": "stdlib"}]},
        train={"tokens_per_step": 2 * rows * T * world, "micro_batch_size": rows, "length": "2 steps"},
        optim={"name": "adamw"},
        parallel={"shard": world},
    )
    work = workload(recipe, device, vocab_size=shape["vocab_size"])
    expected = forecast(
        work, cluster(f"{world}xcpu"), Degrees(shard=world), recipe.parallel, rows=rows, checkpointing="none"
    )
    strategy = open_strategy(recipe.parallel, device, torch.float32, compile=False, activation_checkpointing="none")
    model = strategy.prepare(build_model(work.model.config))
    optimizer = AdamW(model.param_groups(), AdamW.Options())
    batches = [_Rows(torch.randint(0, shape["vocab_size"], (rows, T))) for _ in range(2)]
    for step in range(2):
        optimizer.zero_grad()
        strategy.forward_backward(batches, _loss, 1 / (2 * rows * T))
        strategy.clip(model, 1.0)
        strategy.step(optimizer, 1.0, step)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    lasting = [local(t) for t in [*model.parameters(), *gradients, *optimizer.state_dict().values()]]
    mine = [
        sum(t.numel() * t.element_size() for t in lasting),
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    ]
    found = strategy.gather(mine)
    strategy.close()
    return {
        "name": f"{name}, FSDP2 {world}",
        "lasting": max(each[0] for each in found),
        "lasting_estimate": expected.memory.lasting,
        "peak": max(each[1] for each in found),
        "estimate": expected.memory.total,
    }


@dataclass(frozen=True)
class _Rows:
    tokens: torch.Tensor

    def to(self, device: torch.device) -> _Rows:
        return self


def _loss(model: Decoder, batch: _Rows) -> Loss:
    tokens = batch.tokens
    return Loss(model.head.loss(model(tokens, DenseContext(tokens)), tokens, torch.ones(tokens.shape)))


def run_ranks(world: int) -> dict[str, Any]:
    """The figures of FSDP2 over so many ranks of this machine."""
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    command = [sys.executable, *ranks, __file__, "--ranks"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(said[said.index("{") :])


def run(shape: int) -> dict[str, Any]:
    """The figures of a shape of the list, from a process of its own: peak memory never falls."""
    command = [sys.executable, __file__, "--shape", str(shape)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, help="only this one of the list, in this process, as JSON")
    parser.add_argument("--ranks", action="store_true", help="FSDP2 on the ranks that torchrun started, as JSON")
    parser.add_argument("--limit", type=int, help="bytes of memory that the process may have")
    args = parser.parse_args()
    if args.limit is not None:  # data: what is written to; the address space is many times larger from the start
        resource.setrlimit(resource.RLIMIT_DATA, (args.limit, args.limit))
    if args.ranks:
        found = measure_rank()
        if os.environ["RANK"] == "0":
            print(json.dumps(found))
        return
    if args.shape is not None:
        print(json.dumps(measure(*SHAPES[args.shape])))
        return
    print("| model | batch | precision | lasting GiB | estimate | peak GiB | estimate | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for i in range(len(SHAPES)):
        f = run(i)
        gib = [f"{f[key] / 2**30:.3f}" for key in ("lasting", "lasting_estimate")]
        gib += [f"{f[key] / 2**30:.2f}" for key in ("peak", "estimate")]
        cells = [f["name"], f["batch"], f["how"], *gib, f"{f['estimate'] / f['peak']:.2f}"]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
