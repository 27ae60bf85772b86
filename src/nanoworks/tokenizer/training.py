"""Learns a vocabulary from text, with rustbpe or with Hugging Face's trainer; both give the same kind."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator

from nanoworks.common.errors import UserError, nearest
from nanoworks.tokenizer.bpe import Ranks, chars_to_bytes, ranks_from_merges
from nanoworks.tokenizer.special import SPECIAL_TOKENS, SPLIT_PATTERN
from nanoworks.tokenizer.text import safe_pieces
from nanoworks.tokenizer.tokenizer import Tokenizer

MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    trainer: str = "rustbpe",
    pattern: str = SPLIT_PATTERN,
) -> Tokenizer:
    """Train byte-level BPE on `texts`, read once, one document at a time.

    `vocab_size` counts the 256 bytes and the special tokens; the result is smaller when the texts run out of
    pairs to merge. `trainer` is "rustbpe", nanochat's, or "hf", about half as fast; they break ties between
    equally frequent pairs differently. The same texts in the same order always give the same vocabulary.

    Raises:
        UserError: `vocab_size` too small, an unknown trainer, or no text at all.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(f"vocab_size is {vocab_size}; bytes and special tokens alone need {MIN_VOCAB_SIZE}")
    if trainer not in _TRAINERS:
        known = ", ".join(_TRAINERS)
        raise UserError(f"unknown tokenizer trainer {trainer!r}{nearest(trainer, _TRAINERS)}; known: {known}")
    pieces = (piece for text in texts for piece in safe_pieces(text) if piece)
    first = next(pieces, None)
    if first is None:
        raise UserError("there is no text to train a tokenizer on")
    ranks = _TRAINERS[trainer](itertools.chain([first], pieces), vocab_size - len(SPECIAL_TOKENS), pattern)
    return Tokenizer.from_ranks(ranks, pattern)


def _train_rustbpe(texts: Iterator[str], vocab_size: int, pattern: str) -> Ranks:
    import rustbpe

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(texts, vocab_size, pattern=pattern)
    return {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}


def _train_hf(texts: Iterator[str], vocab_size: int, pattern: str) -> Ranks:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=byte_level.alphabet(), show_progress=False)
    # Its time grows with the square of the longest word, and a run of spaces or of base64 is one.
    short = (text[start : start + 8192] for text in texts for start in range(0, len(text), 8192))
    tokenizer.train_from_iterator(short, trainer)
    # Its ids follow its own order of the alphabet; only the merges are kept, so both trainers number alike.
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return ranks_from_merges((chars_to_bytes(left), chars_to_bytes(right)) for left, right in merges)


_TRAINERS = {"rustbpe": _train_rustbpe, "hf": _train_hf}
