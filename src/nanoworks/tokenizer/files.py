"""The three files of a tokenizer directory, as Hugging Face's `AutoTokenizer` reads them.

tokenizer.json holds vocabulary, merges and split pattern; tokenizer_config.json says which special tokens
begin and end a text; chat_template.jinja renders a conversation. Nothing else is stored: tiktoken's encoder is rebuilt
from tokenizer.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanoworks.common.errors import UserError
from nanoworks.tokenizer.bpe import (
    Ranks,
    bytes_to_chars,
    chars_to_bytes,
    merges_from_ranks,
    ranks_from_merges,
)
from nanoworks.tokenizer.special import special_ids

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def read_files(directory: Path) -> dict[str, str]:
    """Return the text of the files named above that `directory` has, by name.

    Raises:
        UserError: there is no tokenizer.json, or a file is not UTF-8 text.
    """
    if not (directory / TOKENIZER).is_file():
        if (directory / "tokenizer.pkl").is_file():
            raise UserError(
                f"{directory} holds nanochat's pickled tokenizer; read it with "
                "nanoworks.tokenizer.nanochat.import_nanochat_tokenizer and save it"
            )
        raise UserError(f"{directory} has no {TOKENIZER}; make one with: nanoworks tokenizer train")
    files = {}
    for name in (TOKENIZER, CONFIG, TEMPLATE):
        path = directory / name
        if path.is_file():
            try:
                files[name] = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                raise UserError(f"{path} is damaged: it is not UTF-8 text") from None
    return files


def write_files(directory: Path, files: Mapping[str, str]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")


def nanochat_files(ranks: Mapping[bytes, int], pattern: str) -> dict[str, str]:
    """Return the files of a vocabulary with nanochat's special tokens after its last rank."""
    bos, assistant_end = "<|bos|>", "<|assistant_end|>"
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": assistant_end,
        "pad_token": assistant_end,
        # Otherwise decode() would drop spaces before punctuation.
        "clean_up_tokenization_spaces": False,
    }
    return {
        TOKENIZER: json.dumps(_document(ranks, pattern), ensure_ascii=False, separators=(",", ":")) + "\n",
        CONFIG: json.dumps(config, indent=2) + "\n",
        TEMPLATE: Path(__file__).with_name(TEMPLATE).read_text(encoding="utf-8"),
    }


def parse_nanochat(document: Mapping[str, Any]) -> tuple[Ranks, str] | None:
    """Return (ranks, split pattern) of a tokenizer.json of the kind `nanochat_files` writes, else None.

    Exact or not at all: any field that could lead to other ids than tiktoken's makes it another kind.
    """
    try:
        split, byte_level = document["pre_tokenizer"]["pretokenizers"]
        model, pattern = document["model"], split["pattern"]["Regex"]
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        ranks = ranks_from_merges((chars_to_bytes(left), chars_to_bytes(right)) for left, right in merges)
        added = {token["content"]: token["id"] for token in document["added_tokens"]}
        same = (
            model["type"] == "BPE"
            and not any(model[key] for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
            and model["vocab"] == {bytes_to_chars(token): rank for token, rank in ranks.items()}
            and document["normalizer"] is None
            and split == _split(pattern)
            and (byte_level["type"], byte_level["add_prefix_space"], byte_level["use_regex"])
            == ("ByteLevel", False, False)
            and added == special_ids(ranks)
        )
    except (KeyError, TypeError, ValueError):  # UserError among them
        return None
    return (ranks, pattern) if same else None


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _document(ranks: Mapping[bytes, int], pattern: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    merges = merges_from_ranks(ranks)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for token, i in special_ids(ranks).items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [_split(pattern), _BYTE_LEVEL]},
        "post_processor": None,
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {bytes_to_chars(token): rank for token, rank in ranks.items()},
            "merges": [[bytes_to_chars(left), bytes_to_chars(right)] for left, right in merges],
        },
    }
