"""ARC: multiple-choice science questions of grade schools (https://arxiv.org/abs/1803.05457).

`arc_easy` and `arc_challenge` are its two sets; `arc` takes the set as its `subset`. A local file has the
hub's columns: question, choices {text: [...], label: [...]}, answerKey.
"""

from __future__ import annotations

from typing import Literal

from nanoworks.common.errors import UserError
from nanoworks.tasks.base import TASKS, TaskOptions
from nanoworks.tasks.multiple_choice import MultipleChoiceTask, Question
from nanoworks.tasks.rows import HubFiles, load_rows


@TASKS.register("arc")
class Arc(MultipleChoiceTask):
    class Options(TaskOptions):
        split: Literal["train", "validation", "test"] = "test"
        subset: Literal["ARC-Easy", "ARC-Challenge"] = "ARC-Easy"

    def __init__(self, options: Options) -> None:
        self.name = options.subset.lower().replace("-", "_")
        hub = HubFiles("allenai/ai2_arc", f"{options.subset}/{options.split}-*.parquet")
        self.rows = load_rows(options.path, hub, ("question", "choices", "answerKey"), limit=options.limit)

    def __len__(self) -> int:
        return len(self.rows)

    def question(self, i: int) -> Question:
        row, where = self.rows[i], self.rows.where(i)
        try:
            choices = tuple(str(text) for text in row["choices"]["text"])
            letters = tuple(str(label) for label in row["choices"]["label"])
        except (TypeError, KeyError):
            raise UserError(f"{where}: choices is not an object of the lists text and label") from None
        answer = row["answerKey"]
        if answer not in letters or len(letters) != len(choices):
            raise UserError(f"{where}: answerKey {answer!r} is not one of the labels {list(letters)}")
        return Question(str(row["question"]), letters, choices, answer)


@TASKS.register("arc_easy")
class ArcEasy(Arc):
    class Options(Arc.Options):
        subset: Literal["ARC-Easy"] = "ARC-Easy"


@TASKS.register("arc_challenge")
class ArcChallenge(Arc):
    class Options(Arc.Options):
        subset: Literal["ARC-Challenge"] = "ARC-Challenge"
