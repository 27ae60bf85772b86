"""MMLU: multiple-choice questions of 57 subjects (https://arxiv.org/abs/2009.03300).

A local file has the hub's columns: question, choices (four texts), answer (index of the right one).
"""

from __future__ import annotations

from typing import Literal

from nanoworks.common.errors import UserError
from nanoworks.tasks.base import TASKS, TaskOptions
from nanoworks.tasks.multiple_choice import MultipleChoiceTask, Question
from nanoworks.tasks.rows import HubFiles, load_rows

LETTERS = ("A", "B", "C", "D")


@TASKS.register("mmlu")
class MMLU(MultipleChoiceTask):
    name = "mmlu"

    class Options(TaskOptions):
        split: Literal["train", "dev", "validation", "test"] = "test"

    def __init__(self, options: Options) -> None:
        split = "auxiliary_train" if options.split == "train" else options.split
        hub = HubFiles("cais/mmlu", f"all/{split}-*.parquet")
        self.rows = load_rows(options.path, hub, ("question", "choices", "answer"), limit=options.limit)

    def __len__(self) -> int:
        return len(self.rows)

    def question(self, i: int) -> Question:
        row = self.rows[i]
        choices, answer = row["choices"], row["answer"]
        if not isinstance(choices, list) or len(choices) != len(LETTERS):
            raise UserError(f"{self.rows.where(i)}: choices is not a list of {len(LETTERS)} texts")
        if answer not in range(len(LETTERS)):
            raise UserError(f"{self.rows.where(i)}: answer {answer!r} is not an index of choices (0 to 3)")
        return Question(str(row["question"]), LETTERS, tuple(str(c) for c in choices), LETTERS[answer])
