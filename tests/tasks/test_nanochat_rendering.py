"""What nanochat itself trained on, token by token (golden data beside the checkout)."""

from __future__ import annotations

import json

import pytest

from nanoworks.tasks import build_task
from nanoworks.tokenizer.nanochat import import_nanochat_tokenizer
from tests.tasks.conftest import write_jsonl


@pytest.fixture(scope="module")
def nanochat(shared_dir):
    """nanochat's tokenizer, and the ids of its midtraining and SFT rows as texts of numbers."""
    folder = shared_dir / "golden" / "nanochat" / "old"
    golden = json.loads((folder / "golden.json").read_text())
    batches = golden["mid"]["train"] + golden["sft"]["train"]
    stream = [token for inputs, _ in batches for row in inputs for token in row]
    return import_nanochat_tokenizer(folder / "base" / "tokenizer"), f" {' '.join(map(str, stream))} "


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("mmlu", {"question": "Which number is item 15?", "choices": ["15", "16", "17", "18"], "answer": 3}),
        (
            "gsm8k",
            {
                "question": "Tom has 14 boxes with 9 pens each. How many pens? (#12)",
                "answer": "There are 14*9 = <<14*9=126>>126 pens.\n#### 126",
            },
        ),
        (
            "conversations",
            [
                {"role": "user", "content": "Who are you? (9)"},
                {"role": "assistant", "content": "I am nanochat, a small language model. Answer number 9."},
            ],
        ),
    ],
)
def test_a_row_becomes_the_tokens_nanochat_trained_on(nanochat, tmp_path, name, row):
    tokenizer, stream = nanochat
    task = build_task(name, {"path": write_jsonl(tmp_path / "rows.jsonl", [row]), "split": "train"})
    ids = tokenizer.render(task.conversation(0)).ids
    assert f" {' '.join(map(str, ids))} " in stream


def test_spelling_a_word(nanochat, tmp_path):
    tokenizer, stream = nanochat
    (tmp_path / "words.txt").write_text("keyboard")  # of the train split
    task = build_task("simple_spelling", {"path": str(tmp_path / "words.txt"), "split": "train"})
    ids = tokenizer.render(task.conversation(0)).ids
    assert f" {' '.join(map(str, ids))} " in stream
