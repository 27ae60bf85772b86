"""nanochat's tokenizer.pkl: read without building what it asks for, written as nanochat reads it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch

from nanoworks.common.errors import UserError
from nanoworks.tokenizer import SPLIT_PATTERN, Tokenizer
from nanoworks.tokenizer.nanochat import export_nanochat_tokenizer, import_nanochat_tokenizer

RANKS = {bytes([byte]): byte for byte in range(256)}


def test_round_trip(tokenizer: Tokenizer, golden: dict[str, Any], tmp_path: Path) -> None:
    export_nanochat_tokenizer(tokenizer, tmp_path)
    assert import_nanochat_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    encoding = pickle.loads((tmp_path / "tokenizer.pkl").read_bytes())  # as nanochat does
    assert (type(encoding), encoding.n_vocab) == (tiktoken.Encoding, 1024)
    for case in golden["encode"]:
        assert encoding.encode_ordinary(case["text"]) == case["ids"]
    token_bytes = torch.load(tmp_path / "token_bytes.pt", weights_only=True)
    assert token_bytes.dtype == torch.int32
    assert token_bytes.tolist() == golden["token_bytes"]


@pytest.mark.parametrize("era", ["old", "new"])
def test_nanochats_own_files(shared_dir: Path, tokenizer: Tokenizer, tmp_path: Path, era: str) -> None:
    folder = shared_dir / "golden" / "nanochat" / era / "base" / "tokenizer"
    imported = import_nanochat_tokenizer(folder)
    assert imported.fingerprint == tokenizer.fingerprint
    export_nanochat_tokenizer(imported, tmp_path)
    theirs, ours = (pickle.loads((path / "tokenizer.pkl").read_bytes()) for path in (folder, tmp_path))
    assert ours._mergeable_ranks == theirs._mergeable_ranks
    assert (ours._special_tokens, ours._pat_str) == (theirs._special_tokens, theirs._pat_str)
    if era == "new":
        written = torch.load(folder / "token_bytes.pt", weights_only=True)
        assert torch.equal(torch.load(tmp_path / "token_bytes.pt", weights_only=True), written)


class Evil:
    ran = False

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("import nanoworks.tokenizer.nanochat as m; m.EVIL = 1",)


def encoding(**changes: Any) -> tiktoken.Encoding:
    settings = {
        "pat_str": SPLIT_PATTERN,
        "mergeable_ranks": RANKS,
        "special_tokens": {"<|bos|>": 256},
        **changes,
    }
    return tiktoken.Encoding("test", **settings)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (pickle.dumps(Evil()), "refused: it asks for builtins.exec"),
        (pickle.dumps({"x": Path("a")}), r"refused: it asks for pathlib"),
        (pickle.dumps(encoding(), protocol=0), "refused: it asks for copy_?reg._reconstructor"),
        (pickle.dumps({"pat_str": ""}), "holds no tiktoken encoding"),
        (pickle.dumps(encoding())[:300], "is damaged"),
        (b"", "is damaged"),
        (b"not a pickle", "is damaged"),
        (pickle.dumps(encoding()), "not nanochat's nine"),
        (
            pickle.dumps(encoding(mergeable_ranks={**RANKS, b"xyz": 256}, special_tokens={})),
            "cannot be built",
        ),
    ],
)
def test_refusals(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "tokenizer.pkl").write_bytes(content)
    with pytest.raises(UserError, match=reason):
        import_nanochat_tokenizer(tmp_path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no tokenizer.pkl"):
        import_nanochat_tokenizer(tmp_path)


def test_export_of_another_kind(llama3_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nanochat can only read"):
        export_nanochat_tokenizer(Tokenizer.load(llama3_dir), tmp_path)
