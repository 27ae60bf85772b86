"""Scores a model on a task, through the engine that also serves it.

An evaluation is one of two things: *generate until* the model ends its answer and let the task score the
text, or compare the *log-likelihoods* of the letters of a multiple-choice question. The engine batches both.

    evaluate(engine, tokenizer, build_task("gsm8k", {"path": "test.jsonl"}), max_examples=100).value
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nanoworks.common.errors import UserError
from nanoworks.engine import Completion, Engine, Request, SamplingParams
from nanoworks.evals.progress import progress_bar
from nanoworks.evals.prompts import PLAIN_STOP, letter_ids, prompt_ids, text_of
from nanoworks.evals.result import TaskResult, mean_and_stderr, pass_at_k
from nanoworks.tasks import Task
from nanoworks.tokenizer import Tokenizer

Example = dict[str, Any]
"""One line of `<task>.jsonl`: index, prompt, reference, what the model said, score; or `error`."""

Update = Callable[[int, int], None]


@dataclass(frozen=True)
class Settings:
    """How to ask.

    Attributes:
        max_examples: the first so many of the task; None: all.
        samples: answers to each question; `value` is then pass@1 over all of them.
        temperature: 0 takes the most likely token.
        top_k: sample among so many tokens; None: all. (nanochat samples among 50.)
        max_tokens: longest answer.
        chat: ask in the chat format; False: as plain text, `Question: ... Answer:`, for a base model.
        seed: of the sampling.
    """

    max_examples: int | None = None
    samples: int = 1
    temperature: float = 0.0
    top_k: int | None = None
    max_tokens: int = 512
    chat: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_examples is not None and self.max_examples < 1:
            raise UserError(f"max_examples={self.max_examples} must be 1 or more")
        if self.samples > 1 and self.temperature == 0:
            raise UserError("at temperature 0 all samples are the same; set a temperature, e.g. 0.8")
        self.sampling(0)  # checks the rest

    def sampling(self, i: int) -> SamplingParams:
        """Return how to answer example i, whose random numbers are its own."""
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            n=self.samples,
            seed=self.seed * 1_000_003 + i,
            stop=() if self.chat else PLAIN_STOP,
        )


def evaluate(
    engine: Engine,
    tokenizer: Tokenizer,
    task: Task,
    *,
    name: str | None = None,
    out: Path | None = None,
    step: int | None = None,
    progress: bool = False,
    **settings: Any,
) -> TaskResult:
    """Return how well the model answers `task`; keywords besides these are those of `Settings`.

    An example that cannot be run (a prompt beyond the context, a score that raises) is recorded with its
    message and counts as wrong.

    Args:
        name: what the result is called; default: the task's own name.
        out: directory to write `<name>.json` and `<name>.jsonl` into.
        step: training step to note in the result.
        progress: draw a progress bar on stderr.

    Raises:
        UserError: a setting is wrong, or not one example could be run.
    """
    how = Settings(**settings)
    name = name or task.name
    count = len(task) if how.max_examples is None else min(len(task), how.max_examples)
    answer = _choose if task.kind == "multiple_choice" else _generate
    with progress_bar(name, show=progress) as update:
        examples = answer(engine, tokenizer, task, count, how, update)
    result = _result(name, task, examples, how)
    if out is not None:
        result.write(out, step=step)
    return result


def _generate(
    engine: Engine, tokenizer: Tokenizer, task: Task, count: int, how: Settings, update: Update
) -> list[Example]:
    examples: list[Example] = [{"index": i} for i in range(count)]
    prompts: list[tuple[Example, list[int]]] = []
    for example in examples:
        with _recorded(example):
            prompt = _prompt(tokenizer, task, example, how)
            engine.check(Request(prompt, how.sampling(0)))
            prompts.append((example, prompt))
    sampling = [how.sampling(example["index"]) for example, _ in prompts]
    groups = engine.generate([prompt for _, prompt in prompts], sampling, progress=update)

    def score(example: Example, group: list[Completion]) -> None:
        with _recorded(example):
            if any(completion.finish_reason == "error" for completion in group):
                raise ValueError("the model's output is not finite")
            scores = [task.score(example["index"], completion.text) for completion in group]
            example["samples"] = [
                {"completion": c.text, "finish_reason": c.finish_reason, "score": s}
                for c, s in zip(group, scores, strict=True)
            ]
            example["score"] = math.fsum(scores) / len(scores)

    # Threads, because a task may score in a process of its own (a sandbox) and the time is spent there.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(score, [example for example, _ in prompts], groups))
    return examples


def _choose(
    engine: Engine, tokenizer: Tokenizer, task: Task, count: int, how: Settings, update: Update
) -> list[Example]:
    examples: list[Example] = [{"index": i} for i in range(count)]
    questions: list[tuple[Example, list[str]]] = []
    pairs: list[tuple[list[int], list[int]]] = []
    for example in examples:
        with _recorded(example):
            prompt = _prompt(tokenizer, task, example, how)
            letters = task.choices(example["index"])
            answers = [letter_ids(tokenizer, letter, chat=how.chat) for letter in letters]
            engine.check(Request(prompt, continuations=answers))
            questions.append((example, letters))
            pairs += [(prompt, answer) for answer in answers]
    sums = iter([likelihood.sum for likelihood in engine.loglikelihood(pairs, progress=update)])
    for example, letters in questions:
        likelihoods = {letter: next(sums) for letter in letters}
        with _recorded(example):
            if not all(map(math.isfinite, likelihoods.values())):
                raise ValueError("the model's output is not finite")
            example["loglikelihoods"] = likelihoods
            example["prediction"] = max(likelihoods, key=likelihoods.__getitem__)
            example["baseline"] = 1 / len(letters)
            example["score"] = task.score(example["index"], example["prediction"])
    return examples


def _prompt(tokenizer: Tokenizer, task: Task, example: Example, how: Settings) -> list[int]:
    """Return the ids to ask example's question with; note question and reference answer in `example`."""
    conversation = task.conversation(example["index"])
    *_, question, reference = conversation["messages"]
    example["prompt"], example["reference"] = text_of(question["content"]), text_of(reference["content"])
    return prompt_ids(tokenizer, conversation, chat=how.chat)


@contextmanager
def _recorded(example: Example) -> Iterator[None]:
    """Write an exception of the block into the example instead of letting it end the evaluation."""
    try:
        yield
    except Exception as error:
        said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        example.update(error=said, score=0.0)


def _result(name: str, task: Task, examples: list[Example], how: Settings) -> TaskResult:
    errors = [example["error"] for example in examples if "error" in example]
    if len(errors) == len(examples):
        first = f"; the first: {errors[0]}" if errors else ""
        raise UserError(f"{name}: none of {len(examples)} examples could be run{first}")
    value, stderr = mean_and_stderr([example["score"] for example in examples])
    details: dict[str, Any] = {}
    if how.samples > 1 and task.kind == "generative":
        ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k < how.samples] + [how.samples]
        right = [sum(s["score"] >= 1 for s in example.get("samples", ())) for example in examples]
        details = {f"pass@{k}": math.fsum(pass_at_k(how.samples, c, k) for c in right) / len(right) for k in ks}
    baselines = [example.pop("baseline") for example in examples if "baseline" in example]
    return TaskResult(
        task=name,
        kind=task.kind,
        metric="pass@1" if details else "accuracy",
        value=value,
        stderr=stderr,
        n=len(examples),
        failed=len(errors),
        baseline=math.fsum(baselines) / len(baselines) if baselines else 0.0,
        settings=asdict(how),
        details=details,
        examples=examples,
    )
