"""A synthetic pipeline on disk, of the shape and size of a small real one, for every test of the reports."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ENVIRONMENT = {
    "nanoworks": "0.1.0",
    "git_commit": "0123456789ab",
    "python": "3.11.8",
    "torch": "2.13.0",
    "platform": "Linux-6.1-x86_64",
    "cpu": "Example CPU 9000",
    "cores": 2,
    "threads": 2,
    "memory_gib": 15.6,
    "device": "cpu",
    "device_name": None,
    "device_count": None,
    "device_memory_gib": None,
}
MODEL = {
    "model_type": "nanochat",
    "parameters": 11_534_336,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "vocab_size": 4096,
    "context": 512,
    "tokenizer": "5f1d0c27aa93",
}
SCORES = {  # task: score after pretrain, midtrain, sft, rl
    "microworld_arithmetic": (0.02, 0.71, 0.90, 0.955),
    "microworld_facts": (0.11, 0.82, 0.965, 0.97),
    "microworld_choice": (0.26, 0.77, 0.94, 0.938),
    "microworld_spelling": (0.0, 0.41, 0.63, 0.64),
}
STAGES = {  # stage: steps, first loss, last loss, learning rate
    "pretrain": (900, 8.3, 2.35, 0.02),
    "midtrain": (400, 2.9, 1.21, 0.01),
    "sft": (150, 1.15, 0.62, 0.004),
    "rl": (60, 0.4, 0.2, 0.001),
}


def write_run(
    directory: Path, stage: str, *, parent: str | None = None, seed: int = 0, lr: float | None = None
) -> Path:
    """Write a finished run of `stage` as the trainer would; another `seed` gives slightly other figures."""
    steps, first, last, stage_lr = STAGES[stage]
    rng = random.Random(f"{stage}-{seed}")
    lr = lr or stage_lr
    directory.mkdir(parents=True)
    created = 1_700_000_000.0 + 10_000 * list(STAGES).index(stage)
    write_json(
        directory / "run.json",
        {
            "id": f"{stage}-{seed}",
            "name": directory.name,
            "stage": stage,
            "parent": parent,
            "created": created,
            "status": "finished",
            "environment": ENVIRONMENT,
            "model": MODEL,
            "total_steps": steps,
        },
    )
    config = {
        "stage": {"name": stage},
        "tokenizer": "runs/tokenizer" if stage == "pretrain" else None,
        "run": {"name": directory.name, "root": "runs", "seed": seed},
        "data": {
            "sequence_length": 512,
            "train": [
                {"name": "stdlib", "weight": 1.0},
                {"name": "microworld", "weight": 2.5, "split": "train"},
            ],
            "validation": [{"name": "microworld", "weight": 1.0, "split": "validation"}],
        },
        "train": {"length": f"{steps} steps", "tokens_per_step": 4096},
        "optim": {"name": "muon_adamw", "lr": lr},
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    with (directory / "metrics.jsonl").open("w") as file:
        for line in metrics(stage, steps, first, last, lr, created, rng):
            file.write(json.dumps(line) + "\n")
    for task, scores in SCORES.items():
        value = min(1.0, scores[list(STAGES).index(stage)] + 0.01 * seed)
        write_json(
            directory / "evals" / f"step-{steps:06d}" / f"{task}.json",
            {
                "task": task,
                "kind": "multiple_choice" if task.endswith("choice") else "generative",
                "metric": "accuracy",
                "value": value,
                "stderr": math.sqrt(value * (1 - value) / 500),
                "n": 500,
                "failed": 0,
                "baseline": 0.25 if task.endswith("choice") else 0.0,
                "step": steps,
                "settings": {"temperature": 0.0, "max_tokens": 64},
            },
        )
    with (directory / "samples.jsonl").open("w") as file:
        for step in (steps // 2, steps):
            for prompt, completion in PROMPTS:
                file.write(json.dumps({"step": step, "prompt": prompt, "completion": completion}) + "\n")
    return directory


PROMPTS = [
    ("def fibonacci(n):", "\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a"),
    (
        "Mira has 17 baskets with 24 pears each. How many pears?",
        "Mira has <|python_start|>17 * 24<|python_end|><|output_start|>408<|output_end|> 408 pears.",
    ),
]


def metrics(
    stage: str, steps: int, first: float, last: float, lr: float, created: float, rng: random.Random
) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    time = created + 3.0
    for step in range(1, steps + 1):
        seconds = 0.45 * rng.uniform(0.93, 1.12) * (4 if step == 1 else 1)
        time += seconds
        done = step / steps
        value = last + (first - last) * math.exp(-7 * done) + rng.gauss(0, 0.05)
        line: dict[str, Any] = {
            "step": step,
            "time": round(time, 3),
            "train/loss": value,
            "train/lr": lr * min(1.0, step / 20, (1 - done) / 0.4 + 0.02),
            "train/grad_norm": 0.8 * math.exp(rng.gauss(0, 0.25)) * (40 if step == steps // 3 else 1),
            "train/tokens": 4096 * step,
            "train/tokens_per_second": 4096 / seconds,
            "train/mfu": 0.52 * 0.45 / seconds,
            "train/memory_gib": 1.2 + 0.3 * min(1.0, step / 10),
            "train/step_seconds": seconds,
        }
        if stage == "rl":
            reward = 0.6 + 0.33 * (1 - math.exp(-4 * done)) + rng.gauss(0, 0.02)
            line |= {"rl/reward": reward, "rl/kl": 0.02 * done + abs(rng.gauss(0, 0.002))}
        lines.append(line)
        if step % (steps // 6) == 0:
            time += 2.0
            lines.append(
                {"step": step, "time": round(time, 3), "val/loss": value + 0.04, "val/bpb": value / 3.1}
                | {f"eval/{task}": scores[1] * done for task, scores in SCORES.items()}
            )
    return lines


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_pipeline(root: Path) -> Path:
    """Write pretrain -> midtrain -> sft -> rl below `root` and return the last run."""
    parent = None
    for stage, (steps, *_) in STAGES.items():
        write_run(root / stage, stage, parent=parent)
        parent = str(root / stage / f"step-{steps:06d}")
    return root / "rl"


@pytest.fixture
def make_run() -> Callable[..., Path]:
    """The function that writes one run."""
    return write_run


@pytest.fixture
def make_pipeline() -> Callable[[Path], Path]:
    """The function that writes a pipeline of four runs."""
    return write_pipeline


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last run of a whole pipeline. Shared: tests must not write into it."""
    return write_pipeline(tmp_path_factory.mktemp("runs") / "demo")
