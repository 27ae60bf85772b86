"""nanoworks: from raw text to a production endpoint for small language models.

import nanoworks
m = nanoworks.load("runs/sft")        # a run, a step, a Hugging Face or a nanochat checkpoint directory
print(m.chat("What is 12 times 7?"))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LLM", "LoadedModel", "SamplingParams", "__version__", "load"]

if TYPE_CHECKING:
    from nanoworks.api import LoadedModel, load
    from nanoworks.engine import SamplingParams
    from nanoworks.llm import LLM

_HOMES = {
    "load": "nanoworks.api",
    "LoadedModel": "nanoworks.api",
    "LLM": "nanoworks.llm",
    "SamplingParams": "nanoworks.engine",
}


def __getattr__(name: str) -> Any:
    # Deferred, so that `import nanoworks` costs no torch.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'nanoworks' has no attribute {name!r}")
