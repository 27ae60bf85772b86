"""Conversations to learn from, without a right answer to score: SmolTalk, and your own file.

`conversations` reads a .jsonl file whose lines are lists of messages (nanochat's identity conversations) or
objects `{"messages": [...]}`, in the order of the file. `smoltalk` is the hub's smol-smoltalk
(https://arxiv.org/abs/2502.02737).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from nanoworks.common.errors import UserError
from nanoworks.tasks.base import TASKS, Conversation, Task, TaskOptions
from nanoworks.tasks.rows import HubFiles, Rows, load_rows
from nanoworks.tokenizer import validate_conversation


class ConversationTask(Task):
    rows: Rows

    def __len__(self) -> int:
        return len(self.rows)

    def score(self, i: int, completion: str) -> float:
        raise UserError(f"{self.name} has no right answers to score against; use it as training data")


@TASKS.register("conversations")
class Conversations(ConversationTask):
    name = "conversations"

    class Options(TaskOptions):
        path: str = Field(description="a .jsonl file, one conversation a line")

    def __init__(self, options: Options) -> None:
        self.rows = load_rows(options.path, None, (), limit=options.limit, shuffle=False)
        for i in range(len(self)):
            try:
                validate_conversation(self.conversation(i))
            except UserError as error:
                raise UserError(f"{self.rows.where(i)}: {error}") from None

    def conversation(self, i: int) -> Conversation:
        row = self.rows[i]
        return {"messages": row["messages"] if isinstance(row, dict) and "messages" in row else row}


@TASKS.register("smoltalk")
class SmolTalk(ConversationTask):
    name = "smoltalk"

    class Options(TaskOptions):
        split: Literal["train", "test"] = "train"

    def __init__(self, options: Options) -> None:
        hub = HubFiles("HuggingFaceTB/smol-smoltalk", f"data/{options.split}-*.parquet")
        self.rows = load_rows(options.path, hub, ("messages",), limit=options.limit)

    def conversation(self, i: int) -> Conversation:
        return {"messages": self.rows[i]["messages"]}
