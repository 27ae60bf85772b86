"""A tokenizer.json as llama.cpp has it: a list of tokens, their kinds, merges or scores, and the name of a split.

llama.cpp knows splits by name and not by pattern, so only those it has can be written. It has none that cuts numbers
into one or two digits, as our own vocabularies do: theirs is written as the one that is the same but for
numbers of three digits and more, and `note` says so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nanoworks.common.errors import UserError
from nanoworks.tokenizer import Tokenizer
from nanoworks.tokenizer.special import SPLIT_PATTERN

_GPT4 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"

# Split pattern -> llama.cpp's name. "dbrx" splits as "llama-bpe" does and merges by the rules alone.
_SPLITS = {
    _CONTRACTIONS + _GPT4 % "{1,3}": "dbrx",
    _CONTRACTIONS + _GPT4 % "": "qwen2",
    SPLIT_PATTERN: "dbrx",
}

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


class GgufTokenizer:
    """`metadata`: key after "tokenizer." -> value. `note`: what llama.cpp will do otherwise, or None."""

    def __init__(self, directory: Path, vocab_size: int) -> None:
        """UserError when llama.cpp has nothing that encodes as the tokenizer of `directory` does."""
        self._document = _read(directory / "tokenizer.json")
        self._config = _read(directory / "tokenizer_config.json")
        model = self._document["model"]
        if model.get("type") != "BPE":
            raise UserError(f"{directory}: only BPE vocabularies are written to GGUF, this is {model.get('type')}")
        self.note: str | None = None
        byte_level = "ByteLevel" in json.dumps([self._document.get("pre_tokenizer"), self._document.get("decoder")])
        tokens, kinds = self._tokens(vocab_size)
        self.metadata: dict[str, Any] = {"ggml.tokens": tokens, "ggml.token_type": kinds}
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        if byte_level:
            self.metadata |= {"ggml.model": "gpt2", "ggml.pre": self._split(directory), "ggml.merges": merges}
        elif model.get("byte_fallback"):
            self.metadata |= {"ggml.model": "llama", "ggml.pre": "default", "ggml.scores": _scores(tokens, merges)}
            self.metadata["ggml.add_space_prefix"] = self._adds_space()
        else:
            raise UserError(f"{directory}: neither a byte-level vocabulary nor one with byte fallback; no GGUF of it")
        tokenizer = Tokenizer.load(directory)
        self.metadata |= {"ggml.bos_token_id": tokenizer.bos_id, "ggml.eos_token_id": tokenizer.eos_id}
        self.metadata["ggml.add_bos_token"] = self._adds_bos()
        template = directory / "chat_template.jinja"
        if template.is_file():
            self.metadata["chat_template"] = template.read_text(encoding="utf-8")
        elif isinstance(self._config.get("chat_template"), str):
            self.metadata["chat_template"] = self._config["chat_template"]

    def _tokens(self, vocab_size: int) -> tuple[list[str], list[int]]:
        model = self._document["model"]
        names = {i: token for token, i in model["vocab"].items()}
        kinds = {i: BYTE if model.get("byte_fallback") and _is_byte(token) else NORMAL for i, token in names.items()}
        for added in self._document.get("added_tokens") or []:
            names[added["id"]] = added["content"]
            kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
        unknown = model["vocab"].get(model.get("unk_token"))
        if unknown is not None:
            kinds[unknown] = UNKNOWN
        ids = range(vocab_size)  # a model may have more rows than its tokenizer has tokens
        return [names.get(i, f"[PAD{i}]") for i in ids], [kinds.get(i, UNUSED) for i in ids]

    def _split(self, directory: Path) -> str:
        first = self._document.get("pre_tokenizer") or {}
        first = first["pretokenizers"][0] if first.get("type") == "Sequence" else first
        if first.get("type") == "ByteLevel" and first.get("use_regex", True):
            return "gpt-2"
        pattern = first.get("pattern", {}).get("Regex")
        if pattern not in _SPLITS:
            raise UserError(
                f"{directory}: llama.cpp has no split like this tokenizer's, {pattern!r}; a GGUF would encode text "
                "otherwise than the model was trained on"
            )
        if pattern == SPLIT_PATTERN:
            self.note = (
                "llama.cpp has no split that cuts numbers into one or two digits: from text it encodes numbers of "
                "three digits and more otherwise than the model was trained on; token ids are not affected"
            )
        name = _SPLITS[pattern]
        return "llama-bpe" if name == "dbrx" and self._document["model"].get("ignore_merges") else name

    def _adds_space(self) -> bool:
        parts = json.dumps([self._document.get("normalizer"), self._document.get("pre_tokenizer")])
        return '"Prepend"' in parts or '"prepend_scheme": "always"' in parts or '"prepend_scheme": "first"' in parts

    def _adds_bos(self) -> bool:
        """Whether text begins with the BOS token: as the configuration says, or the post-processor does; ours do."""
        if "add_bos_token" in self._config:
            return bool(self._config["add_bos_token"])
        if "<|bos|>" in [t["content"] for t in self._document.get("added_tokens") or []]:
            return True
        single = (self._document.get("post_processor") or {}).get("single") or [{}]
        return "SpecialToken" in single[0]


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """SentencePiece joins the pair whose token has the best score; BPE the pair whose merge is first."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", "", 1), rank)
    return [-float(ranks[token] + 1) if token in ranks else -float(len(merges) + 1) for token in tokens]


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
