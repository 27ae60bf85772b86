"""GSM8K: word problems of grade-school mathematics (https://arxiv.org/abs/2110.14168).

Its answers hold calculator annotations, `48/2 = <<48/2=24>>24`; each becomes a call of the calculator tool
and its output. The last line is `#### 24`. A local file (the official .jsonl) has question and answer.
"""

from __future__ import annotations

import re
from typing import Literal

from nanoworks.tasks.answers import same_final_number
from nanoworks.tasks.base import TASKS, Conversation, Task, TaskOptions
from nanoworks.tasks.rows import HubFiles, load_rows

_CALL = re.compile(r"<<([^>]+)>>")


@TASKS.register("gsm8k")
class GSM8K(Task):
    name = "gsm8k"

    class Options(TaskOptions):
        split: Literal["train", "test"] = "test"
        subset: Literal["main", "socratic"] = "main"

    def __init__(self, options: Options) -> None:
        hub = HubFiles("openai/gsm8k", f"{options.subset}/{options.split}-*.parquet")
        self.rows = load_rows(options.path, hub, ("question", "answer"), limit=options.limit)

    def __len__(self) -> int:
        return len(self.rows)

    def conversation(self, i: int) -> Conversation:
        row = self.rows[i]
        return {
            "messages": [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": answer_parts(row["answer"])},
            ]
        }

    def score(self, i: int, completion: str) -> float:
        return float(same_final_number(completion, self.rows[i]["answer"]))


def answer_parts(answer: str) -> list[dict[str, str]]:
    """Split an annotated answer into text and, for each `<<expression=result>>`, a call and its output."""
    parts: list[dict[str, str]] = []
    for n, piece in enumerate(_CALL.split(answer)):  # the odd pieces are what the brackets held
        if n % 2:
            expression, _, result = piece.rpartition("=")
            parts.append({"type": "python", "text": expression or result})
            parts.append({"type": "python_output", "text": result if expression else ""})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts
