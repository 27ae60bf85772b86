"""The two encoders behind a `Tokenizer`: tiktoken for our own vocabularies, `tokenizers` for all others.

Both treat text as text: a special token spelled out in it is never encoded as that token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Protocol

import tiktoken
import tokenizers

from nanoworks.common.errors import UserError
from nanoworks.tokenizer import files
from nanoworks.tokenizer.bpe import chars_to_bytes
from nanoworks.tokenizer.special import special_ids
from nanoworks.tokenizer.text import safe_pieces


class Backend(Protocol):
    """What a `Tokenizer` needs of an encoder."""

    tokens: dict[int, bytes]  # id -> raw bytes; a special token's are its name
    special_tokens: dict[str, int]

    @property
    def rules(self) -> str:
        """All that decides ids besides `tokens`, for the fingerprint."""
        ...

    def encode(self, text: str) -> list[int]:
        """Must release the GIL while it works, so that threads help."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...

    @property
    def files(self) -> Mapping[str, str]:
        """The tokenizer directory: file name -> text."""
        ...


class TiktokenBackend:
    """Byte-level BPE with nanochat's special tokens after the last rank."""

    def __init__(self, ranks: Mapping[bytes, int], pattern: str) -> None:
        self.ranks, self.rules = ranks, pattern
        self.special_tokens = special_ids(ranks)
        self.tokens = {rank: token for token, rank in ranks.items()}
        self.tokens.update((i, token.encode()) for token, i in self.special_tokens.items())
        self.encoding = tiktoken.Encoding(
            "nanoworks", pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens=self.special_tokens
        )

    def encode(self, text: str) -> list[int]:
        pieces = safe_pieces(text)
        if len(pieces) == 1:
            return self.encoding.encode_ordinary(pieces[0])
        return [i for piece in pieces for i in self.encoding.encode_ordinary(piece)]

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.tokens[i] for i in ids).decode(errors="replace")

    @cached_property
    def files(self) -> Mapping[str, str]:
        return files.nanochat_files(self.ranks, self.rules)


class HuggingFaceBackend:
    """Any tokenizer.json that the `tokenizers` library reads (Llama, Qwen, GPT-2, ...)."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        """`texts` are the directory's files by name; saving writes the same again."""
        self.files = texts
        self._plain = self._build()
        self._plain.encode_special_tokens = True  # in this library's words: as ordinary text
        added = self._plain.get_added_tokens_decoder()
        self.special_tokens = {token.content: i for i, token in added.items() if token.special}
        document = json.loads(texts[files.TOKENIZER])
        byte_level = '"ByteLevel"' in json.dumps(document.get("decoder"))
        self._ids = self._plain.get_vocab(with_added_tokens=True)
        self.tokens = {
            i: token.encode() if i in added else _raw_bytes(token, byte_level) for token, i in self._ids.items()
        }
        parts = ("normalizer", "pre_tokenizer", "model")
        self.rules = json.dumps([document.get(part) for part in parts], sort_keys=True)

    def id_of(self, token: str) -> int:
        """Return the id of a token spelled as in tokenizer_config.json; UserError if there is none."""
        if token not in self._ids:
            raise UserError(f"{files.CONFIG} names {token!r}, a token that {files.TOKENIZER} does not have")
        return self._ids[token]

    def encode(self, text: str) -> list[int]:
        return [i for piece in safe_pieces(text) for i in _encode(self._plain, piece).ids]

    def encode_markup(self, text: str) -> tuple[list[int], list[int]]:
        """Encode text in which special tokens are spelled out and meant.

        Returns the ids and, for each, the index in `text` of its first character.
        """
        encoded = _encode(self._markup, "".join(safe_pieces(text)))
        return encoded.ids, [start for start, _ in encoded.offsets]

    def decode(self, ids: Sequence[int]) -> str:
        return self._plain.decode(list(ids), skip_special_tokens=False)

    @cached_property
    def _markup(self) -> tokenizers.Tokenizer:
        # A second instance, because "as ordinary text" is a setting of the whole object.
        return self._build()

    def _build(self) -> tokenizers.Tokenizer:
        try:
            tokenizer = tokenizers.Tokenizer.from_str(self.files[files.TOKENIZER])
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"{files.TOKENIZER} is damaged or of an unknown kind: {error}") from None
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer


def _encode(tokenizer: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
    return tokenizer.encode(text, add_special_tokens=False)


def _raw_bytes(token: str, byte_level: bool) -> bytes:
    """The bytes a vocabulary entry stands for: GPT-2's alphabet, or SentencePiece's `<0x0A>` and `▁`."""
    if byte_level:
        try:
            return chars_to_bytes(token)
        except KeyError:  # an entry the model can never produce from text
            return token.encode()
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()
