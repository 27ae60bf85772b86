"""Pretraining on this machine's accelerator: tokens/s, MFU, memory against the plan, the slowest kernels.

    python benchmarks/gpu.py                        # the Llama recipes of 120M and 1B, bfloat16, compiled and not
    python benchmarks/gpu.py --recipes pretrain/llama-120m --steps 3 --rows 1 --set data.sequence_length=64 \\
        --set model.num_hidden_layers=2 --modes eager       # a smoke test, on a CPU too

Each is a run of `nanoworks train` with the rows of its recipe. Text is the standard library of the running Python,
tokenizer included, so nothing is downloaded. Serving is measured by benchmarks/gpu_serving.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from nanoworks.common.device import choose_device, choose_dtype, supports_compile
from nanoworks.config import Recipe, load_recipe
from nanoworks.config.pipeline import TokenizerSection
from nanoworks.train.launch import launch
from nanoworks.train.pipeline import prepare_tokenizer

PROFILED = 5
"""Steps of the run whose kernels are listed; another run than the timed one, which the profiler would slow."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default="pretrain/llama-120m,pretrain/llama-1b")
    parser.add_argument("--modes", default="compiled,eager")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rows", type=int, help="of a micro-batch; the recipe's when left out")
    parser.add_argument("--micro-batches", type=int, default=2, help="of a step")
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--top", type=int, default=10, help="kernels listed")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe; repeatable")
    args = parser.parse_args()
    device = choose_device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    print(f"{name}, {choose_dtype('auto', device)}, PyTorch {torch.__version__}")
    with tempfile.TemporaryDirectory() as root:
        tokenizer = Path(root) / "tokenizer"
        prepare_tokenizer(TokenizerSection(vocab_size=args.vocab_size, data=[{"name": "stdlib"}]), tokenizer)
        for path in args.recipes.split(","):
            for mode in args.modes.split(","):
                if mode == "compiled" and not supports_compile(device):
                    print(f"\n{path}, compiled: left out, torch.compile does not work here")
                    continue
                recipe = benchmarked(path, args, root=root, compiled=mode == "compiled")
                print(
                    f"\n{path}, {mode}: {recipe.train.micro_batch_size} x {recipe.data.sequence_length} tokens at once"
                )
                speed(launch(recipe).run)
                kernels(benchmarked(path, args, root=root, compiled=mode == "compiled", profiled=True), args.top)


def benchmarked(path: str, args: argparse.Namespace, *, root: str, compiled: bool, profiled: bool = False) -> Recipe:
    """The recipe at `path` on text that every machine has, of a few steps and without evaluation."""
    base = load_recipe(path, args.set)
    rows = args.rows or base.train.micro_batch_size
    words = [Path(path).stem, "compiled" if compiled else "eager", *(["profiled"] if profiled else [])]
    changes = {
        "run.name": "-".join(words),
        "run.root": root,
        "tokenizer": f"{root}/tokenizer",
        "hardware.compile": compiled,
        "data.train": [{"name": "stdlib"}],
        "data.validation": [],
        "data.packing": "stream",
        "train.length": f"{PROFILED if profiled else args.steps} steps",
        "train.micro_batch_size": rows,
        "train.tokens_per_step": rows * base.data.sequence_length * args.micro_batches,
    }
    return load_recipe(path, [*args.set, *(f"{key}={json.dumps(value)}" for key, value in changes.items())])


def speed(run: Path) -> None:
    """The figures of a finished run, its first tenth left out, beside what the planner said before it."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    info = json.loads((run / "run.json").read_text())
    settled = [r for r in rows if "train/tokens_per_second" in r][len(rows) // 10 :]
    print(f"  tokens/s    {median(settled, 'train/tokens_per_second'):,.0f}")
    if any("train/mfu" in r for r in settled):
        print(f"  MFU         {median(settled, 'train/mfu'):.1%}")
    plan = info["plan"]
    print(f"  planned     {plan['predicted']['tokens_per_second']:,.0f} tokens/s")
    actual, predicted = plan["actual"]["memory_gib"], plan["predicted"]["memory_gib"]
    print(f"  memory      {actual:.2f} GiB, planned {predicted:.2f} GiB ({actual / predicted:.2f})")
    print(f"  loss        {rows[0]['train/loss']:.3f} -> {rows[-1]['train/loss']:.3f}")


def median(rows: Sequence[dict[str, Any]], key: str) -> float:
    return statistics.median(r[key] for r in rows if key in r)


def kernels(recipe: Recipe, top: int) -> None:
    """Run `recipe` under the profiler and print the kernels that took most of the time, on a CPU the operators."""
    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        launch(recipe)
    events = profiler.key_averages()
    if cuda:  # what the host launched them from carries their time a second time
        events = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    times = [(e.self_device_time_total if cuda else e.self_cpu_time_total, e.count, e.key) for e in events]
    total = sum(microseconds for microseconds, _, _ in times)
    print(f"  {'share':>6}  {'ms':>9}  {'calls':>7}  kernel")
    for microseconds, calls, name in sorted(times, reverse=True)[:top]:
        print(f"  {microseconds / total:6.1%}  {microseconds / 1000:9.1f}  {calls:7,}  {name[:90]}")


if __name__ == "__main__":
    main()
