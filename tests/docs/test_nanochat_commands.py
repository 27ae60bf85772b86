"""Every command of docs/coming-from-nanochat.md, run in its order on a model of two layers and a hub of a few rows.

The commands and flags are read from the page; what is added to them here only makes them small.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.docs.test_coming_from_nanochat import COMMANDS, RECIPES, SECTIONS
from tests.hub import hub
from tests.train.tiny import TEXT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SMALL = [
    "hardware.device=cpu",
    "hardware.dtype=float32",
    "hardware.threads=1",
    "train.length=2 steps",
    "train.micro_batch_size=2",
    "checkpoint.every=1",
]
SMALL_DATA = ["data.sequence_length=256", "train.tokens_per_step=512", "eval.tokens=512", "eval.every=1"]
SMALL_TASKS = ["eval.max_examples=2", "eval.tasks_every=1"]


def parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=8)
    return file.getvalue()


def repositories() -> dict[str, dict[str, bytes]]:
    """A few rows of each data set that nanochat's stages read, under the names it has on the hub."""
    words = TEXT.split()
    texts = parquet([{"text": " ".join(words[i % 9 :] * 4) + "."} for i in range(60)])
    shards = ["shard_00000.parquet", "shard_00001.parquet", "shard_01822.parquet"]
    chats = parquet(
        [
            {"messages": [{"role": "user", "content": f"Hello {i}"}, {"role": "assistant", "content": TEXT}]}
            for i in range(40)
        ]
    )
    mmlu = parquet(
        [
            {"question": f"{i} + 1?", "choices": ["1", "2", "3", "4"], "answer": i % 4, "subject": "sums"}
            for i in range(20)
        ]
    )
    arc = parquet(
        [
            {
                "question": f"Is {i} even?",
                "choices": {"text": ["yes", "no"], "label": ["A", "B"]},
                "answerKey": "AB"[i % 2],
            }
            for i in range(20)
        ]
    )
    gsm8k = parquet(
        [
            {"question": f"What is {i} + {i}?", "answer": f"It is <<{i}+{i}={2 * i}>>{2 * i}.\n#### {2 * i}"}
            for i in range(20)
        ]
    )
    humaneval = parquet(
        [
            {
                "task_id": "T/0",
                "prompt": "def one():\n",
                "canonical_solution": "    return 1\n",
                "test": "def check(f):\n    assert f() == 1\n",
                "entry_point": "one",
            }
        ]
    )
    return {
        "karpathy/fineweb-edu-100b-shuffle": dict.fromkeys(shards, texts),
        "HuggingFaceTB/smol-smoltalk": {f"data/{s}-00000-of-00001.parquet": chats for s in ("train", "test")},
        "cais/mmlu": {f"all/{s}-00000-of-00001.parquet": mmlu for s in ("auxiliary_train", "test", "validation")},
        "allenai/ai2_arc": {
            f"{subset}/{s}-00000-of-00001.parquet": arc
            for subset in ("ARC-Easy", "ARC-Challenge")
            for s in ("train", "test")
        },
        "openai/gsm8k": {f"main/{s}-00000-of-00001.parquet": gsm8k for s in ("train", "test")},
        "openai/openai_humaneval": {"openai_humaneval/test-00000-of-00001.parquet": humaneval},
    }


def core_bundle(root: Path) -> None:
    (root / "eval_data").mkdir(parents=True)
    items = [{"context": f"one two {i}", "continuation": "three"} for i in range(6)]
    (root / "eval_data" / "lm.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    entry = {"label": "lm", "dataset_uri": "lm.jsonl", "icl_task_type": "language_modeling", "num_fewshot": [1]}
    (root / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": [entry]}))
    (root / "eval_meta_data.csv").write_text("Eval Task,Task Category,Random baseline\nlm,words,0.0\n")


class House:
    """A working directory with a hub; `ran` are the commands of the page that were run."""

    def __init__(self, root: Path, endpoint: str) -> None:
        self.root = root
        self.ran: list[str] = []
        self.environment = os.environ | {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(root / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "NANOWORKS_CACHE": str(root / "cache"),
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "NANOCHAT_BASE_DIR": str(root / "nanochat"),
        }

    def start(self, words: list[str], **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "nanoworks", *words],
            cwd=self.root,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **options,
        )

    def run(self, words: list[str]) -> str:
        with self.start(words) as process:
            said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, f"nanoworks {' '.join(words)}\n{said}"
        return said

    def page(self, line: str, *more: str, **replacements: str) -> str:
        """Run a command of the page, with words replaced by name and `more` after it."""
        assert line in PAGE_COMMANDS, line
        self.ran.append(line)
        words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', line)][1:]
        for old, new in replacements.items():
            words = [word.replace(old, new) for word in words]
        return self.run([*words, *more])


# Without the demo, which is larger than this test may be and which `make demo` runs.
PAGE_COMMANDS = [c for c in SECTIONS["Commands"] if c.startswith("nanoworks ") and c != "nanoworks demo"]


def flags(recipe: str) -> list[str]:
    """Every `path=value` of the recipe's table."""
    return [c.replace('"', "") for c in RECIPES[recipe] if re.fullmatch(r"[a-z_.0-9]+=.+", c)]


def options(verb: str) -> list[str]:
    """Every `--option value` of the command's table, as words."""
    return [word for cell in COMMANDS[verb] if cell.startswith("--") for word in cell.split()]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    root = tmp_path_factory.mktemp("house")
    core_bundle(root / "eval_bundle")
    with hub(files := repositories()) as endpoint:
        for shard in ("shard_00000.parquet", "shard_01822.parquet"):
            (root / shard).write_bytes(files["karpathy/fineweb-edu-100b-shuffle"][shard])
        yield House(root, endpoint)


def test_every_command_and_flag_runs(house: House) -> None:
    runs = house.root / "runs"
    house.page(
        "nanoworks tokenizer train FILES --vocab-size 65536 --out runs/tokenizer",
        FILES="shard_00000.parquet",
        **{"65536": "300"},
    )
    assert "bytes" in house.page("nanoworks tokenizer eval runs/tokenizer")

    shards = [f"data.{part}.0={{name: fineweb_edu, shards: 2}}" for part in ("train", "validation")]
    small_model = ["model.depth=2", *SMALL, *SMALL_DATA, *shards, "train.sample_every=2"]
    house.page("nanoworks train pretrain/nanochat model.depth=20", *small_model)
    house.run(["train", "pretrain/nanochat", *flags("pretrain/nanochat"), *small_model, "run.name=flags-pretrain"])
    house.run(["train", "runs/pretrain/config.yaml", "--resume"])

    assert "bpb" in house.page("nanoworks eval runs/pretrain --tasks bpb --path bpb=FILES", FILES="shard_01822.parquet")
    house.page("nanoworks eval runs/pretrain --tasks core --path core=eval_bundle", "--limit", "500")

    for recipe, more in (
        ("midtrain/nanochat", SMALL_DATA),
        ("sft/nanochat", [*SMALL_DATA, *SMALL_TASKS]),
        (
            "rl/nanochat",
            [
                "data.sequence_length=256",
                "stage.prompts_per_step=2",
                "stage.samples_per_prompt=2",
                "stage.max_new_tokens=8",
                *SMALL_TASKS,
            ],
        ),
    ):
        parent = {"midtrain/nanochat": "pretrain", "sft/nanochat": "midtrain", "rl/nanochat": "sft"}[recipe]
        house.page(f"nanoworks train {recipe}", *SMALL, *more)
        small = [*SMALL, *more, f"run.name=flags-{parent}-child", f"init_from=runs/{parent}/step-000002"]
        house.run(["train", recipe, *flags(recipe), *small])

    assert "gsm8k" in house.page("nanoworks eval runs/sft --tasks gsm8k", "--limit", "3")
    house.run(["eval", "runs/sft", *options("nanoworks eval"), "--max-tokens", "8", "--limit", "2"])
    house.page('nanoworks chat runs/sft --prompt "Why is the sky blue?"')
    house.run(["chat", "runs/sft/step-000002", *options("nanoworks chat"), "--prompt", "Hello"])
    house.page("nanoworks report runs/rl")
    assert (runs / "rl" / "report.html").exists()
    serve(house)

    out = "nanochat/chatsft_checkpoints/d20b"
    house.run(["convert", "runs/sft", "--to", "nanochat", "--out", out])
    house.run(["convert", out, "--to", "hf", "--out", "export/d20"])
    house.run(["chat", out, "--prompt", "Hello"])
    assert sorted(house.ran) == sorted(PAGE_COMMANDS), "the page has a command that was not run"


def serve(house: House) -> None:
    """Run the page's `serve` line with its options, ask it something over HTTP, and stop it."""
    line = "nanoworks serve runs/sft"
    house.ran.append(line)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = [
        {"8000": port, "0.0.0.0": "127.0.0.1"}.get(word, word)
        for word in [*line.split()[1:], *options("nanoworks serve")]
    ]
    with house.start(words) as process:
        try:
            until = time.monotonic() + 120
            while True:
                try:
                    httpx.get(f"http://127.0.0.1:{port}/", trust_env=False).raise_for_status()
                    break
                except httpx.TransportError:
                    assert process.poll() is None
                    assert time.monotonic() < until
                    time.sleep(0.2)
            question = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
            answer = httpx.post(
                f"http://127.0.0.1:{port}/v1/chat/completions", json=question, trust_env=False, timeout=60
            )
            assert answer.json()["usage"]["completion_tokens"] <= 4
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)
    assert process.returncode == 0
