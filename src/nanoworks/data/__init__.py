"""Data: sources by name, mixtures of them, and the loader that turns them into batches. See docs/data.md."""

from nanoworks.data.conversations import ConversationSource
from nanoworks.data.loader import Batch, Loader
from nanoworks.data.mixture import Mixture, MixtureReader
from nanoworks.data.registry import SOURCES, build_source
from nanoworks.data.source import Conversation, Document, Reader, Source, SourceOptions

__all__ = [
    "SOURCES",
    "Batch",
    "Conversation",
    "ConversationSource",
    "Document",
    "Loader",
    "Mixture",
    "MixtureReader",
    "Reader",
    "Source",
    "SourceOptions",
    "build_source",
]
