"""What multiple-choice tasks share: nanochat's way of writing a question, and the letter as the answer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from nanoworks.tasks.base import Conversation, Task


@dataclass(frozen=True)
class Question:
    text: str
    letters: tuple[str, ...]
    choices: tuple[str, ...]
    answer: str
    """One of `letters`."""


class MultipleChoiceTask(Task):
    kind = "multiple_choice"

    @abstractmethod
    def question(self, i: int) -> Question: ...

    def conversation(self, i: int) -> Conversation:
        question = self.question(i)
        return {
            "messages": [
                {
                    "role": "user",
                    "content": render_question(question.text, question.letters, question.choices),
                },
                {"role": "assistant", "content": question.answer},
            ]
        }

    def choices(self, i: int) -> list[str]:
        return list(self.question(i).letters)

    def score(self, i: int, completion: str) -> float:
        return float(completion.strip() == self.question(i).answer)


def render_question(text: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """Return nanochat's prompt for a multiple-choice question.

    The letter stands after its choice, which small models bind better, and without a space before it, so that
    it is the very token the answer consists of ("A" and " A" are different tokens).
    """
    lines = "".join(f"- {choice}={letter}\n" for letter, choice in zip(letters, choices, strict=True))
    return f"Multiple Choice question: {text}\n{lines}\nRespond only with the letter of the correct answer."
