"""A mixture of experts against the dense model of equal active parameters, at equal tokens of the demo's data.

    python benchmarks/moe_vs_dense.py [--steps 600] [--seed 42] [--threads 1] [KEY=VALUE of the mixture's recipe ...]

Both have 4 layers of 128 features and train with the demo's pretraining recipe (recipes/demo/pretrain.yaml: optimizer,
rates, schedule, data, tokens a step). A token passes 2 of 8 experts, each half as wide as the dense model's
feed-forward block. Each was given the best of a few settings: the dense model of Muon's rate (0.01, 0.02, 0.03: the
demo's 0.02 is best), the mixture of the rates of experts and routers and of the weight of balance.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from nanoworks.checkpoint import load_checkpoint
from nanoworks.config import load_recipe
from nanoworks.config.load import recipes_dir
from nanoworks.config.pipeline import load_pipeline
from nanoworks.train.launch import launch
from nanoworks.train.pipeline import prepare_tokenizer

SIZES = ["model.hidden_size=128", "model.num_hidden_layers=4", "model.num_attention_heads=4"]
DENSE = ["model.model_type=llama", *SIZES, "model.intermediate_size=384"]
MOE = [
    "model.model_type=mixtral",
    *SIZES,
    "model.intermediate_size=192",
    "model.num_local_experts=8",
    # An expert sees a quarter of the tokens, so its gradient is the noisier and its step should be the shorter.
    "moe.expert_lr_fraction=0.5",
    "moe.router_lr_fraction=0.3",
    "moe.balance_coef=0.003",
]


def train(name: str, root: Path, overrides: list[str]) -> dict[str, Any]:
    """Train one model and return its figures."""
    common = [
        f"run.root={root}",
        f"run.name={name}",
        f"tokenizer={root / 'tokenizer'}",
        "eval.tasks=[]",
        "eval.every=0",
        "train.sample_prompts=[]",
        "checkpoint.every=0",
        "trackers=[jsonl]",
        # The demo validates on program text alone, of which 600 steps see too little; here on what it trains on.
        "data.validation=[{name: microworld, weight: 7}, {name: stdlib, weight: 1}]",
    ]
    recipe = load_recipe(recipes_dir() / "demo" / "pretrain.yaml", [*common, *overrides])
    started = time.perf_counter()
    run = launch(recipe).run
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = {key: value for row in rows for key, value in row.items()}
    last["seconds"] = time.perf_counter() - started
    model = load_checkpoint(run).model
    return last | {"parameters": model.num_parameters(), "active": model.num_active_parameters()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["dense", "moe"])
    parser.add_argument("--root", type=Path)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    root = args.root or Path(tempfile.mkdtemp())
    pipeline, _ = load_pipeline(recipes_dir() / "demo" / "demo.yaml")
    prepare_tokenizer(pipeline.tokenizer, root / "tokenizer")
    common = [
        f"train.length={args.steps} steps",
        f"run.seed={args.seed}",
        f"hardware.threads={args.threads}",
        "eval.tokens=200000",
    ]
    for name, own in (("dense", DENSE), ("moe", [*MOE, *args.overrides])):
        if args.only in (None, name):
            r = train(name, root, [*common, *own])
            print(
                f"{name}: val/loss {r['val/loss']:.4f}  val/bpb {r['val/bpb']:.4f}  train/loss {r['train/loss']:.4f}  "
                f"parameters {r['parameters']:,} ({r['active']:,} active)  seconds {r['seconds']:.0f}  "
                + "  ".join(f"{key} {r[key]:.3f}" for key in ("moe/entropy", "moe/imbalance") if key in r),
                flush=True,
            )


if __name__ == "__main__":
    main()
