"""Text to token ids and back: training, files, encoding, and chat rendering. Imports no torch."""

from __future__ import annotations

from nanoworks.tokenizer.conversation import Conversation, Rendered, message_text, validate_conversation
from nanoworks.tokenizer.special import SPECIAL_TOKENS, SPLIT_PATTERN
from nanoworks.tokenizer.stream import StreamDecoder
from nanoworks.tokenizer.tokenizer import Tokenizer
from nanoworks.tokenizer.training import train_tokenizer

__all__ = [
    "SPECIAL_TOKENS",
    "SPLIT_PATTERN",
    "Conversation",
    "Rendered",
    "StreamDecoder",
    "Tokenizer",
    "message_text",
    "train_tokenizer",
    "validate_conversation",
]
