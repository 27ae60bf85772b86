"""HumanEval: complete a Python function from its signature and docstring (https://arxiv.org/abs/2107.03374).

The completion is joined to the problem's own tests and run in a sandbox. A local file (the official
.jsonl.gz) has the columns prompt, canonical_solution, test, entry_point.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field

from nanoworks.tasks.base import TASKS, Conversation, Task, TaskOptions
from nanoworks.tasks.rows import HubFiles, load_rows
from nanoworks.tasks.sandbox import Execution, Sandbox

_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL)


@TASKS.register("humaneval")
class HumanEval(Task):
    name = "humaneval"

    class Options(TaskOptions):
        split: Literal["test"] = "test"
        timeout_seconds: float = Field(default=5.0, gt=0)
        memory_mib: int = Field(default=512, ge=64)
        allow_unsandboxed: bool = Field(
            default=False, description="run generated code even where it cannot be isolated"
        )

    def __init__(self, options: Options) -> None:
        hub = HubFiles("openai/openai_humaneval", f"openai_humaneval/{options.split}-*.parquet")
        columns = ("prompt", "canonical_solution", "test", "entry_point")
        self.rows = load_rows(options.path, hub, columns, limit=options.limit)
        self.sandbox = Sandbox(
            seconds=options.timeout_seconds,
            memory_bytes=options.memory_mib * 2**20,
            allow_unsandboxed=options.allow_unsandboxed,
        )
        self.sandbox.check()  # now, not after an hour of sampling

    def __len__(self) -> int:
        return len(self.rows)

    def conversation(self, i: int) -> Conversation:
        row = self.rows[i]
        solution = f"{row['prompt']}\n{row['canonical_solution']}"
        return {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": solution},
            ]
        }

    def score(self, i: int, completion: str) -> float:
        return float(self.execute(i, completion).passed)

    def execute(self, i: int, completion: str) -> Execution:
        """Run the tests of problem i on `completion`."""
        row = self.rows[i]
        program = complete_program(row["prompt"], completion, row["entry_point"])
        return self.sandbox.run(f"{program}\n\n{row['test']}\ncheck({row['entry_point']})\n")


def complete_program(prompt: str, completion: str, entry_point: str) -> str:
    """Return the program that `completion` answers `prompt` with.

    The prompt is part of it: its imports and helper functions may be all that a right answer lacks. A
    completion that defines `entry_point` anew replaces the prompt's stub; any other continues its body.
    """
    code = extract_code(completion)
    if re.search(rf"^def {re.escape(entry_point)}\b", code, re.MULTILINE):
        return f"{prompt}\n\n{code}"
    return prompt + code


def extract_code(completion: str) -> str:
    """Return the first fenced block of code (also one cut off before its end), or all if there is none."""
    match = _FENCE.search(completion)
    return match.group(1) if match else completion
