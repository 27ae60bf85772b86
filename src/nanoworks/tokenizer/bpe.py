"""Byte-level BPE as data: the two ways of writing one vocabulary, and the exact conversion between them.

tiktoken knows *ranks*: token bytes -> id, where any two neighbours whose joined bytes are a token may merge,
lowest id first. Hugging Face knows *merges*: an ordered list of pairs. Ours have the 256 single bytes at
ids 0..255 in byte order and the result of merge i at id 256 + i.

Why one pair a token is enough: merges run in id order, so a stretch of text that ends up as one token was
never joined to its surroundings before, and therefore passed through the same states as the token's bytes
alone. It is always completed from the same last two parts: those left when the token's own bytes are
merged with all lower ranks. tests/tokenizer/test_bpe.py holds both encoders to this on random vocabularies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from nanoworks.common.errors import UserError

Ranks = dict[bytes, int]


def _printable_bytes() -> list[str]:
    """GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the others for U+0100 onwards."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(spare)) for byte in range(256)]


_CHARS = _printable_bytes()
_BYTES = {char: byte for byte, char in enumerate(_CHARS)}


def bytes_to_chars(token: bytes) -> str:
    """Write a token the way tokenizer.json does, one printable character a byte."""
    return "".join(_CHARS[byte] for byte in token)


def chars_to_bytes(chars: str) -> bytes:
    """Undo `bytes_to_chars`; KeyError for a character outside the alphabet."""
    return bytes(_BYTES[char] for char in chars)


def ranks_from_merges(merges: Iterable[tuple[bytes, bytes]]) -> Ranks:
    """Return the ranks of a vocabulary given its merges in order.

    Raises:
        UserError: two merges give the same token, so the vocabulary has no ranks.
    """
    ranks = {bytes([byte]): byte for byte in range(256)}
    for left, right in merges:
        token = left + right
        if token in ranks:
            raise UserError(f"not a trained byte-level BPE: two merges give the token {token!r}")
        ranks[token] = len(ranks)
    return ranks


def merges_from_ranks(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return the merges, in order, that build the vocabulary `ranks`.

    Raises:
        UserError: the single bytes are not ids 0..255, an id is missing, or a token cannot be reached
            by merging tokens of lower ids.
    """
    tokens = sorted(ranks, key=ranks.__getitem__)
    if [ranks[token] for token in tokens] != list(range(len(tokens))):
        raise UserError("not a byte-level BPE: the ids of its tokens are not 0, 1, 2, ...")
    if tokens[:256] != [bytes([byte]) for byte in range(256)]:
        raise UserError("not a byte-level BPE of nanochat's layout: ids 0 to 255 are not the single bytes")
    return [_last_merge(token, ranks) for token in tokens[256:]]


def _last_merge(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """Merge the bytes of `token` with every lower rank; the two parts left are its merge."""
    rank = ranks[token]
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(parts[i] + parts[i + 1], rank) for i in range(len(parts) - 1)]
        best = min(joined)
        if best >= rank:
            raise UserError(f"not a trained byte-level BPE: the token {token!r} cannot be built by merging")
        i = joined.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]
