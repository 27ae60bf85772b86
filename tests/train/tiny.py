"""Runs small enough for tests: a tokenizer of 300 tokens, a model of two layers, a corpus of a few sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanoworks.config import Recipe
from nanoworks.config.load import merge
from nanoworks.tokenizer import train_tokenizer

TEXT = "the cat sat on a mat while seven dogs ran over two small hills and 12 birds sang 7 songs"
WORDS = TEXT.split()


def corpus(root: Path) -> Path:
    """A text file of 400 short documents, one a line."""
    file = root / "corpus.jsonl"
    if not file.exists():
        lines = []
        for i in range(400):
            words = [WORDS[(i * 7 + j * (1 + i % 5)) % len(WORDS)] for j in range(8 + i % 20)]
            lines.append(f'{{"text": "{" ".join(words)}."}}')
        file.write_text("\n".join(lines) + "\n")
    return file


def tokenizer(root: Path) -> Path:
    directory = root / "tokenizer"
    if not directory.exists():
        train_tokenizer([corpus(root).read_text()], 300).save(directory)
    return directory


def recipe(root: Path, kind: str = "pretrain", /, **changes: Any) -> Recipe:
    """A valid recipe of the stage `kind`; `changes` are merged over it."""
    file = str(corpus(root))
    chat = [{"name": "microworld_identity"}, {"name": "microworld_facts", "limit": 50}]
    values: dict[str, Any] = {
        "stage": {"name": kind},
        "run": {"name": kind, "root": str(root / "runs")},
        "tokenizer": str(tokenizer(root)),
        "model": {
            "model_type": "nanochat",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 512,
        },
        "hardware": {"device": "cpu", "dtype": "float32", "threads": 1},
        "data": {
            "sequence_length": 64,
            "train": [{"name": "jsonl", "path": file}] if kind == "pretrain" else chat,
            "buffer": 20,
            "prefetch": 2,
        },
        "train": {"length": "12 steps", "tokens_per_step": 256, "micro_batch_size": 2},
        "eval": {"every": 0},
        "checkpoint": {"every": 3},
        "trackers": ["jsonl"],
    }
    if kind == "rl":
        values["stage"] |= {
            "tasks": [{"name": "microworld_identity"}],
            "prompts_per_step": 2,
            "samples_per_prompt": 3,
            "max_new_tokens": 12,
        }
        values["data"]["train"] = []
    return Recipe(**merge(values, changes))
