"""Batches of the real nanochat, from its own files and tokenizer (golden data beside the checkout)."""

from __future__ import annotations

import json
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest

from nanoworks.data import Loader, build_source
from nanoworks.tokenizer import Tokenizer
from nanoworks.tokenizer.nanochat import import_nanochat_tokenizer


def golden(shared_dir: Path, era: str) -> tuple[Path, Tokenizer, dict[str, Any]]:
    folder = shared_dir / "golden" / "nanochat" / era
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    data = json.loads((folder / "golden.json").read_text())["data"]
    return folder / "base", import_nanochat_tokenizer(folder / "base" / "tokenizer"), data


@pytest.mark.parametrize(
    ("split", "key", "rank", "world_size"),
    [("train", "train", 0, 1), ("val", "val", 0, 1), ("train", "train_rank1of2_first", 1, 2)],
)
def test_stream_packing_is_nanochats_of_november_2025(shared_dir, split, key, rank, world_size):
    base, tokenizer, data = golden(shared_dir, "old")
    expected = data[key]
    inputs, targets = expected["inputs"], expected["targets"]
    if key == "train_rank1of2_first":
        inputs, targets = [inputs], [targets]
    source = build_source("parquet", {"path": str(base / "base_data"), "validation": "last_file", "split": split})
    loader = Loader(
        source,
        tokenizer,
        sequence_length=64,
        batch_size=2,
        packing="stream",
        rank=rank,
        world_size=world_size,
        infinite=False,
    )
    batches = list(islice(loader, len(inputs)))
    assert [batch.tokens.tolist() for batch in batches] == inputs
    assert [batch.targets.tolist() for batch in batches] == targets


def test_best_fit_packing_is_newer_nanochats(shared_dir, memory_source):
    # nanochat fills its buffer with whole row groups until it holds at least 1000 documents, and again only
    # when it holds fewer; here the source is what it had read by then, so both choose among the same documents.
    base, tokenizer, data = golden(shared_dir, "new")
    path = str(base / "base_data_climbmix")
    source = build_source("parquet", {"path": path, "validation": "last_file"})
    groups = list(islice(chain.from_iterable([source.read(page) for page in range(8)] for _ in range(3)), 19))
    documents = list(chain.from_iterable(groups))
    loader = Loader(
        memory_source([documents]),
        tokenizer,
        sequence_length=data["train"]["T"],
        batch_size=data["train"]["B"],
        buffer=len(documents),
        infinite=False,
    )
    batches = list(islice(loader, 3))
    assert [batch.tokens.tolist() for batch in batches] == data["train"]["inputs"]
    assert [batch.targets.tolist() for batch in batches] == data["train"]["targets"]
