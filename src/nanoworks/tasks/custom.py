"""A task of your own, described by a YAML file beside its data. No code.

    name: capitals
    path: capitals.jsonl                        # beside the YAML file; .jsonl, .jsonl.gz or .parquet
    prompt: "What is the capital of {{ country }}?"     # Jinja over the fields of a row
    answer: capital                             # field with the right answer
    scorer: contains                            # exact, contains, number, regex or choice

Scorers: `exact` compares without surrounding space; `contains` looks for the answer, in any case; `number`
compares with the last number in the completion; `regex` compares with what group 1 of `pattern` found;
`choice` is multiple choice over the texts in the field `choices`; the answer is a letter, an index or a text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal

import jinja2
import yaml
from jinja2.sandbox import SandboxedEnvironment
from pydantic import Field, ValidationError, model_validator

from nanoworks.common.errors import UserError
from nanoworks.common.validation import explain
from nanoworks.config.base import Frozen
from nanoworks.tasks.answers import last_number
from nanoworks.tasks.base import TASKS, Conversation, Task, TaskOptions
from nanoworks.tasks.multiple_choice import render_question
from nanoworks.tasks.rows import load_rows


class CustomTaskFile(Frozen):
    """The YAML file."""

    name: str = Field(pattern=r"^[\w-]+$")
    path: str
    prompt: str
    answer: str = Field(description="field of a row with the right answer")
    choices: str | None = Field(default=None, description="field of a row with the list of choices")
    scorer: Literal["exact", "contains", "number", "regex", "choice"] = "exact"
    pattern: str | None = Field(default=None, description="regular expression with one group (scorer regex)")
    system: str | None = Field(default=None, description="system message")

    @model_validator(mode="after")
    def _consistent(self) -> CustomTaskFile:
        if (self.scorer == "choice") != (self.choices is not None):
            raise ValueError("scorer: choice and the field choices go together")
        if (self.scorer == "regex") != (self.pattern is not None):
            raise ValueError("scorer: regex and pattern go together")
        try:
            groups = re.compile(self.pattern or "()").groups
        except re.error as error:
            raise ValueError(f"pattern is not a regular expression: {error}") from None
        if groups != 1:
            raise ValueError("pattern needs exactly one group, e.g. 'Answer: (.*)'")
        return self


@TASKS.register("custom")
class CustomTask(Task):
    class Options(TaskOptions):
        path: str = Field(description="the YAML file")

    def __init__(self, options: Options) -> None:
        self.file = read_task_file(Path(options.path))
        self.name = self.file.name
        self.kind = "multiple_choice" if self.file.scorer == "choice" else "generative"
        data = Path(options.path).parent / self.file.path
        columns = [self.file.answer, *([self.file.choices] if self.file.choices else [])]
        self.rows = load_rows(str(data), None, columns, limit=options.limit, shuffle=False)
        self._prompt = _template(self.file.prompt, where=f"{options.path}: prompt")
        for i in range(len(self)):
            self.conversation(i)  # a bad row is found now, not in the middle of an evaluation

    def __len__(self) -> int:
        return len(self.rows)

    def conversation(self, i: int) -> Conversation:
        row = self.rows[i]
        try:
            prompt = self._prompt.render(row)
        except Exception as error:  # a template can go wrong in as many ways as a program
            raise UserError(f"{self.rows.where(i)}: the prompt cannot be written: {error}") from None
        if self.kind == "multiple_choice":
            prompt = render_question(prompt, self.choices(i), [str(text) for text in self._texts(i)])
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": self._answer(i)}]
        system = [{"role": "system", "content": self.file.system}] if self.file.system else []
        return {"messages": [*system, *messages]}

    def choices(self, i: int) -> list[str]:
        return list(ascii_uppercase[: len(self._texts(i))])

    def score(self, i: int, completion: str) -> float:
        if self.file.scorer == "regex":
            assert self.file.pattern is not None
            match = re.search(self.file.pattern, completion)
            completion = (match.group(1) or "") if match else ""
        return float(_SCORERS[self.file.scorer](completion.strip(), self._answer(i)))

    def _texts(self, i: int) -> list[Any]:
        assert self.file.choices is not None
        texts = self.rows[i][self.file.choices]
        if not isinstance(texts, list) or not 2 <= len(texts) <= len(ascii_uppercase):
            raise UserError(f"{self.rows.where(i)}: {self.file.choices} is not a list of 2 to 26 choices")
        return texts

    def _answer(self, i: int) -> str:
        answer = self.rows[i][self.file.answer]
        if self.kind == "generative":
            return str(answer).strip()
        letters, choices = self.choices(i), self._texts(i)
        if answer in letters:
            return str(answer)
        if answer in choices:
            return letters[choices.index(answer)]
        if isinstance(answer, int) and 0 <= answer < len(letters):
            return letters[answer]
        place = f"{self.rows.where(i)}: {self.file.answer}"
        raise UserError(f"{place} {answer!r} is no letter, text or index of {self.file.choices}")


def read_task_file(path: Path) -> CustomTaskFile:
    """Return the checked description of a task; UserError names the line or the field."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        line = error.problem_mark.line + 1 if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark else 1
        raise UserError(f"{path}:{line}: not YAML ({getattr(error, 'problem', error)})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a task file is a mapping with name, path, prompt and answer")
    try:
        return CustomTaskFile(**values)
    except ValidationError as error:
        raise UserError(explain(error, CustomTaskFile, prefix=str(path))) from None


def _template(source: str, *, where: str) -> jinja2.Template:
    try:
        return SandboxedEnvironment(undefined=jinja2.StrictUndefined).from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{where}: not a Jinja template: {error.message} in its line {error.lineno}") from None


_SCORERS: dict[str, Callable[[str, str], bool]] = {
    "exact": lambda completion, answer: completion == answer,
    "regex": lambda completion, answer: completion == answer,
    "choice": lambda completion, answer: completion == answer,
    "contains": lambda completion, answer: answer.casefold() in completion.casefold(),
    "number": lambda completion, answer: last_number(completion) == last_number(answer) is not None,
}
