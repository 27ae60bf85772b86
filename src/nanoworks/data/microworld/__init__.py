"""A small invented world and the questions about it, generated from a seed: the demo's data.

Importing this package registers the data source; the tasks are in `nanoworks.tasks.microworld`.
"""

from nanoworks.data.microworld.documents import KINDS
from nanoworks.data.microworld.example import Draw, Example, Split, distinct_examples, split_of
from nanoworks.data.microworld.facts import LETTERS
from nanoworks.data.microworld.source import MicroworldSource

__all__ = ["KINDS", "LETTERS", "Draw", "Example", "MicroworldSource", "Split", "distinct_examples", "split_of"]
