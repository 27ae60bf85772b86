"""The micro-world's questions as tasks: one class a kind, each with its own way to judge an answer.

What a question is and which split it belongs to is decided in `nanoworks.data.microworld`.
"""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from pydantic import Field

from nanoworks.data.microworld import KINDS, Example, distinct_examples
from nanoworks.tasks.answers import same_final_number
from nanoworks.tasks.base import TASKS, Conversation, Task, TaskOptions

SIZE = {"train": 20_000, "test": 200}


class MicroworldTask(Task):
    """Examples are distinct; a kind that has fewer than were asked for (facts, identity) gives all it has."""

    class Options(TaskOptions):
        split: Literal["train", "test"] = "test"
        seed: int = Field(default=0, description="another seed draws other examples of the same split")
        path: None = Field(default=None, description="not used: the examples are generated")

    kind_of_question: ClassVar[str]

    def __init__(self, options: Options) -> None:
        count = options.limit or SIZE[options.split]
        self.name = f"microworld_{self.kind_of_question}"
        self.examples: list[Example] = distinct_examples(
            KINDS[self.kind_of_question], options.split, count, seed=options.seed
        )

    def __len__(self) -> int:
        return len(self.examples)

    def conversation(self, i: int) -> Conversation:
        return self.examples[i].conversation()


@TASKS.register("microworld_arithmetic")
class Arithmetic(MicroworldTask):
    """Word problems for the calculator; right when the last line is `#### ` and the number."""

    kind_of_question = "arithmetic"

    def score(self, i: int, completion: str) -> float:
        return float(same_final_number(completion, f"#### {self.examples[i].answer}"))


@TASKS.register("microworld_counting")
class Counting(Arithmetic):
    """How often a letter occurs in an unseen word, by the calculator's `"word".count("letter")`."""

    kind_of_question = "counting"


@TASKS.register("microworld_spelling")
class Spelling(MicroworldTask):
    """The letters of an unseen word, in order, after a colon."""

    kind_of_question = "spelling"

    def score(self, i: int, completion: str) -> float:
        return float(completion.rpartition(":")[2].split() == self.examples[i].answer.split())


@TASKS.register("microworld_facts")
class Facts(MicroworldTask):
    """Right when the last word is the fact's value and no other value of the same property is named."""

    kind_of_question = "facts"

    def score(self, i: int, completion: str) -> float:
        example = self.examples[i]
        words = re.findall(r"\w+", completion)
        return float(words[-1:] == [example.answer] and set(words).isdisjoint(example.wrong))


@TASKS.register("microworld_choice")
class Choice(MicroworldTask):
    """Multiple choice over the facts; the answer names the choice and its letter, `It is fox=B`.

    For the letter alone, as MMLU wants it, the model would have to recall the fact and look up its letter in one go,
    which the demo's did not learn. Right when what follows the last `=` is the letter.
    """

    kind_of_question = "choice"

    def score(self, i: int, completion: str) -> float:
        return float(completion.rpartition("=")[2].strip() == self.examples[i].answer)


@TASKS.register("microworld_identity")
class Identity(MicroworldTask):
    kind_of_question = "identity"

    def score(self, i: int, completion: str) -> float:
        return float(completion.strip() == self.examples[i].answer)
