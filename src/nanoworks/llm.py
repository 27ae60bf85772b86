"""Offline inference: many prompts at once, from Python.

from nanoworks import LLM, SamplingParams

with LLM("runs/sft") as llm:
    for output in llm.generate(["The capital of", "Two and two"], SamplingParams(max_tokens=16, temperature=0)):
        print(output.text)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from nanoworks.api import LoadedModel, load
from nanoworks.common.errors import UserError
from nanoworks.common.validation import explain
from nanoworks.engine import Completion, Engine, EngineConfig, Loglikelihood, Request, SamplingParams

Prompt = str | Sequence[int]
"""Text, or token ids."""
Messages = Sequence[Mapping[str, Any]]
"""A conversation: [{"role", "content"}, ...], the user's turn last."""


@dataclass(frozen=True)
class Output:
    """What became of one prompt: its ids, and `SamplingParams.n` completions."""

    prompt_ids: list[int]
    completions: list[Completion]

    @property
    def text(self) -> str:
        """Of the first completion."""
        return self.completions[0].text


class LLM:
    """A model and one engine over it, which all calls share. A context manager.

    Args:
        path_or_model: what `nanoworks.load` takes, or what it returned.
        device, dtype, tensor_parallel: as for `nanoworks.load`.
        quantize: "int8" or "int4" weights, rounded when they are loaded.
        speculate: "ngram", "draft" or "medusa".
        options: fields of `EngineConfig`, such as max_num_seqs=16, kv_memory=2 or max_batch_tokens=4096.

    Raises:
        UserError: nothing to load there, an unknown option (the nearest one is named), or one out of bounds.
    """

    def __init__(
        self,
        path_or_model: str | Path | LoadedModel,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        quantize: str | None = None,
        tensor_parallel: int = 1,
        speculate: str | None = None,
        **options: Any,
    ) -> None:
        given = {"quantize": quantize, "speculate": speculate}
        options |= {name: value for name, value in given.items() if value is not None}
        ready = isinstance(path_or_model, LoadedModel)
        if ready and (device is not None or dtype is not None or tensor_parallel != 1):
            raise UserError("device, dtype and tensor_parallel are chosen when a model is loaded: give them to load")
        config = _config(options | {"tensor_parallel": tensor_parallel})  # a mistake here costs no loading
        self._owned = not ready
        self.model = (
            path_or_model
            if isinstance(path_or_model, LoadedModel)
            else load(path_or_model, device, dtype, tensor_parallel=tensor_parallel)
        )
        self.tokenizer = self.model.checkpoint.tokenizer
        """None when the checkpoint has none: prompts are then token ids."""
        try:
            self._engine: Engine | None = self.model.engine(config, text=self.tokenizer is not None)
        except BaseException:
            self.close()
            raise

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise UserError("this LLM was closed; make another")
        return self._engine

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[Output]:
        """Continue each prompt, as text (after the token that begins a text) or as token ids.

        Args:
            prompts: one or many.
            params: for all, or one for each; None: those of `SamplingParams()`.
            progress: draw a bar on stderr, if that is a terminal.

        Raises:
            UserError: before anything runs, when one of the prompts cannot be (it is named by its index).
        """
        return self._generate([self._ids(prompt) for prompt in _many(prompts)], params, progress)

    def chat(
        self,
        messages: str | Messages | Sequence[Messages],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[Output]:
        """Answer a question, a conversation, or each of many conversations; rendered as `nanoworks chat` does."""
        if self.tokenizer is None:
            raise UserError(f"{self.model.checkpoint.path} has no tokenizer, so it cannot chat")
        render = self.tokenizer.render_for_completion
        return self._generate([render({"messages": m}) for m in _conversations(messages)], params, progress)

    def score(
        self,
        prompts: Prompt | Sequence[Prompt],
        continuations: Prompt | Sequence[Prompt],
        *,
        progress: bool = True,
    ) -> list[Loglikelihood]:
        """Return the log-likelihood of each continuation after its prompt.

        One prompt serves for all continuations, and is computed once; else there are as many of both. A text is
        tokenized by itself, so a continuation carries its own leading space.
        """
        before = [self._ids(prompt) for prompt in _many(prompts)]
        after = [self._ids(text, bos=False) for text in _many(continuations)]
        if len(before) == 1:
            before *= len(after)
        if len(before) != len(after):
            raise UserError(f"{len(before)} prompts for {len(after)} continuations; give one prompt, or as many")
        for i, ids in enumerate(after):
            if not ids:
                raise UserError(f"continuation {i} is empty; there is nothing to score")
        self._check(
            [Request(p, SamplingParams(max_tokens=0), continuations=[c]) for p, c in zip(before, after, strict=True)]
        )
        with _bar(self.engine, show=progress) as update:
            return self.engine.loglikelihood(list(zip(before, after, strict=True)), progress=update)

    def close(self) -> None:
        """Give up the engine, and the model's processes if this object loaded it."""
        self._engine = None
        if self._owned:
            self.model.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _generate(
        self, prompts: list[list[int]], params: SamplingParams | Sequence[SamplingParams] | None, progress: bool
    ) -> list[Output]:
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise UserError(f"{len(params)} params for {len(prompts)} prompts; give one, or as many")
        self._check([Request(prompt, p) for prompt, p in zip(prompts, params, strict=True)])
        with _bar(self.engine, show=progress) as update:
            groups = self.engine.generate(prompts, params, progress=update)
        return [Output(prompt, group) for prompt, group in zip(prompts, groups, strict=True)]

    def _ids(self, prompt: Prompt, *, bos: bool = True) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise UserError(f"{self.model.checkpoint.path} has no tokenizer; give token ids instead of text")
            return self.tokenizer.encode(prompt, bos=bos)
        ids = list(prompt)
        wrong = next((token for token in ids if not isinstance(token, int) or isinstance(token, bool)), None)
        if wrong is not None:
            raise UserError(f"a prompt is a text or a list of token ids, {wrong!r} is neither")
        return ids

    def _check(self, requests: list[Request]) -> None:
        for i, request in enumerate(requests):
            try:
                self.engine.check(request)
            except UserError as error:
                raise UserError(f"prompt {i}: {error}") from None


def _config(options: Mapping[str, Any]) -> EngineConfig:
    try:
        return EngineConfig(**options)
    except ValidationError as error:
        raise UserError(explain(error, EngineConfig, prefix="LLM")) from None


def _many(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many -> many."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise UserError(f"prompts are a text, token ids, or a list of these, not {type(prompts).__name__}")
    items: list[Any] = list(prompts)
    single = items and all(isinstance(item, int) for item in items)
    if not single:
        for i, item in enumerate(items):
            if not isinstance(item, (str, Sequence)):
                raise UserError(f"prompt {i} is a text or a list of token ids, not {item!r}")
    return [items] if single else items


def _conversations(messages: Any) -> list[list[Mapping[str, Any]]]:
    """A question, a conversation or many -> many conversations."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    given = list(messages)
    if given and all(isinstance(item, Mapping) for item in given):
        given = [given]
    for i, conversation in enumerate(given):
        well_formed = isinstance(conversation, Sequence) and not isinstance(conversation, str)
        if not (well_formed and conversation and all(isinstance(message, Mapping) for message in conversation)):
            raise UserError(f'conversation {i} is no list of {{"role": ..., "content": ...}}: {conversation!r}')
    return [list(conversation) for conversation in given]


@contextmanager
def _bar(engine: Engine, *, show: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Draw finished samples and tokens a second on stderr, if that is a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    console = Console(stderr=True)
    if not (show and console.is_terminal):
        yield None
        return
    before = engine.stats()

    class Speed(ProgressColumn):
        """Drawn several times a second, whether or not a sample has ended."""

        def render(self, task: Task) -> Text:
            now, seconds = engine.stats(), task.elapsed or 0.0
            made = now.tokens_generated - before.tokens_generated
            count = made or now.tokens_computed - before.tokens_computed
            return Text(f"{count / seconds:,.0f} tok/s" if seconds and count else "- tok/s")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Speed(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        line = bar.add_task("samples", total=None)
        yield lambda done, total: bar.update(line, completed=done, total=total)
