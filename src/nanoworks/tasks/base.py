"""What a task is, and the table of tasks.

A task is a list of conversations, each complete with its reference answer, and a way to score another answer.
So one object is training data (`conversation`), a benchmark and a reinforcement-learning reward (`score`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from nanoworks.common.registry import Registry
from nanoworks.config.base import Frozen

Conversation = dict[str, Any]
"""The form that `nanoworks.tokenizer.conversation` describes, as in `nanoworks.data`, which would import torch."""


class TaskOptions(Frozen):
    """What every task can be told; a task's own `Options` adds to it."""

    split: str = "test"
    limit: int | None = Field(default=None, gt=0, description="only the first so many examples; null: all")
    path: str | None = Field(default=None, description="local file instead of the task's own source")


class Task(ABC):
    """One instance is one split of one task.

    An index outside `range(len(task))` is an IndexError; a `limit` beyond the data set is clipped to it.
    """

    name: str
    kind: Literal["generative", "multiple_choice"] = "generative"
    Options: ClassVar[type[TaskOptions]] = TaskOptions

    @abstractmethod
    def __init__(self, options: Any) -> None:
        """`options` is an instance of the class's own `Options`; UserError when its data cannot be read."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def conversation(self, i: int) -> Conversation:
        """Return example i, the reference answer as its last message."""

    @abstractmethod
    def score(self, i: int, completion: str) -> float:
        """Return how right `completion` is as the answer to example i: 1.0 right, 0.0 wrong."""

    def choices(self, i: int) -> list[str]:
        """Return the letters of example i, one of which is the answer (kind multiple_choice only)."""
        raise NotImplementedError(f"{self.name} has no choices")


TASKS: Registry[type[Task]] = Registry(
    "task",
    {
        "arc": "nanoworks.tasks.arc",
        "arc_challenge": "nanoworks.tasks.arc",
        "arc_easy": "nanoworks.tasks.arc",
        "conversations": "nanoworks.tasks.conversations",
        "custom": "nanoworks.tasks.custom",
        "gsm8k": "nanoworks.tasks.gsm8k",
        "humaneval": "nanoworks.tasks.humaneval",
        "microworld_arithmetic": "nanoworks.tasks.microworld",
        "microworld_choice": "nanoworks.tasks.microworld",
        "microworld_counting": "nanoworks.tasks.microworld",
        "microworld_facts": "nanoworks.tasks.microworld",
        "microworld_identity": "nanoworks.tasks.microworld",
        "microworld_spelling": "nanoworks.tasks.microworld",
        "mmlu": "nanoworks.tasks.mmlu",
        "simple_spelling": "nanoworks.tasks.spelling",
        "smoltalk": "nanoworks.tasks.conversations",
        "spelling_bee": "nanoworks.tasks.spelling",
    },
)


def build_task(name: str, options: Mapping[str, Any] | None = None, *, where: str | None = None) -> Task:
    """Return the task called `name` with `options` validated; `where` prefixes what an error says."""
    return TASKS.get(name)(TASKS.parse(name, options or {}, where=where))
