"""nanochat's tokenizer files: `tokenizer.pkl`, a pickled tiktoken Encoding, and `token_bytes.pt`.

A pickle can run any code when it is loaded. Reading here allows the one class nanochat writes, and even that
is not built: only the plain data it would have been given is taken.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

from nanoworks.common.errors import UserError
from nanoworks.tokenizer.backends import TiktokenBackend
from nanoworks.tokenizer.bpe import merges_from_ranks
from nanoworks.tokenizer.special import special_ids
from nanoworks.tokenizer.tokenizer import Tokenizer

PICKLE = "tokenizer.pkl"
TOKEN_BYTES = "token_bytes.pt"


def import_nanochat_tokenizer(directory: str | Path) -> Tokenizer:
    """Read the `tokenizer.pkl` in `directory`, with the ids it has in nanochat.

    Raises:
        UserError: no such file, a damaged one, one that asks for any other class or function (named in the
            message), or a vocabulary that is not nanochat's.
    """
    path = Path(directory) / PICKLE
    if not path.is_file():
        raise UserError(f"{directory} has no {PICKLE}; give nanochat's tokenizer directory")
    try:
        state = _EncodingUnpickler(io.BytesIO(path.read_bytes())).load()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    fields = getattr(state, "fields", None)
    if not isinstance(fields, dict) or not {"pat_str", "mergeable_ranks", "special_tokens"} <= fields.keys():
        raise UserError(f"{path} holds no tiktoken encoding with its vocabulary")
    ranks = fields["mergeable_ranks"]
    merges_from_ranks(ranks)  # refuses a vocabulary that tokenizer.json could not hold exactly
    if fields["special_tokens"] != special_ids(ranks):
        raise UserError(f"{path}: its special tokens are not nanochat's nine at the end of the vocabulary")
    return Tokenizer.from_ranks(ranks, fields["pat_str"])


def export_nanochat_tokenizer(tokenizer: Tokenizer, directory: str | Path) -> None:
    """Write `tokenizer.pkl` and `token_bytes.pt` into `directory`, for nanochat to read.

    `token_bytes.pt` counts the raw bytes of each token, as newer nanochat does. The Nov-2025 version wrote
    the length after decoding, 3 for a lone byte from 0x80 on, so its bits per byte come out lower than ours.

    Raises:
        UserError: the tokenizer is of another kind (a Hugging Face one).
    """
    import torch

    if not isinstance(tokenizer.backend, TiktokenBackend):
        raise UserError("nanochat can only read a tokenizer with its own special tokens and byte-level BPE")
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    (target / PICKLE).write_bytes(pickle.dumps(tokenizer.backend.encoding))
    torch.save(torch.tensor(tokenizer.token_bytes(), dtype=torch.int32), target / TOKEN_BYTES)


class _EncodingState:
    """Stands in for tiktoken's class: takes the pickled fields and does nothing with them."""

    fields: Any = None

    def __setstate__(self, fields: Any) -> None:
        self.fields = fields


class _EncodingUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("tiktoken.core", "Encoding"):
            return _EncodingState
        raise UserError(f"refused: it asks for {module}.{name}, and only tiktoken.core.Encoding is allowed")
