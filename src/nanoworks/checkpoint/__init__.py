"""Models and training state on disk."""

from nanoworks.checkpoint.checkpoint import (
    Checkpoint,
    check_vocabulary,
    latest_step,
    load_checkpoint,
    locate,
    save_checkpoint,
    steps_of,
)
from nanoworks.checkpoint.state import load_state, save_state

__all__ = [
    "Checkpoint",
    "check_vocabulary",
    "latest_step",
    "load_checkpoint",
    "load_state",
    "locate",
    "save_checkpoint",
    "save_state",
    "steps_of",
]
