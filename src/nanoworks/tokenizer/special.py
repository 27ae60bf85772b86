"""What is fixed in nanochat's vocabulary: the special tokens, and how text is split before merging.

Both are part of every checkpoint's meaning, so they equal nanochat's byte for byte.
"""

from __future__ import annotations

from collections.abc import Sized

# The nine special tokens, in id order; they follow the last merge at the end of the vocabulary.
SPECIAL_TOKENS = (
    "<|bos|>",  # begins every document and every conversation
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",  # the assistant calls the tool ...
    "<|python_end|>",
    "<|output_start|>",  # ... and the tool answers
    "<|output_end|>",
)

# GPT-4's split pattern with numbers cut into one or two digits instead of up to three: a small vocabulary
# cannot afford a token for each of a thousand numbers.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)


def special_ids(ranks: Sized) -> dict[str, int]:
    """Return the ids of the special tokens after a vocabulary of `len(ranks)` ordinary tokens."""
    return {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
