"""One completion of a text, or of several: its chunks while the engine works, or the whole answer."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from nanoworks.engine import Delta
from nanoworks.serve.answer.encode import encode, usage_of
from nanoworks.serve.answer.logprobs import TextLogprobs
from nanoworks.serve.generation import Generation, together
from nanoworks.serve.protocol.common import StreamOptions
from nanoworks.tokenizer import Tokenizer


@dataclass
class _Choice:
    """One sample of one prompt; `texts` and `logprobs` are collected for a whole answer only."""

    logprobs_of: TextLogprobs
    begun: bool = False
    texts: list[str] = field(default_factory=list)
    logprobs: dict[str, list[Any]] = field(default_factory=dict)
    reason: str = ""


class TextAnswer:
    """An answer under way; read either `events` or `whole`, once. Choices go by prompt, then by sample.

    Args:
        jobs: a generation for each prompt, all with the same parameters.
        tokenizer: of the model.
        head: the fields that name the answer's model.
        echo: the text begins with the prompt.
        bos_added: the prompts begin with a bos that the client did not write.
    """

    def __init__(
        self,
        jobs: Sequence[Generation],
        tokenizer: Tokenizer,
        head: dict[str, Any],
        *,
        echo: bool,
        bos_added: bool,
    ) -> None:
        self._jobs, self._tokenizer, self._echo = jobs, tokenizer, echo
        self._first = 1 if bos_added else 0  # the client's first token in a prompt
        self._head = {
            "id": f"cmpl-{jobs[0].request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            **head,
        }
        params = jobs[0].params
        self._n, self._wants_logprobs = params.n, params.logprobs is not None
        self._prompt: dict[int, tuple[list[float | None], list[list[tuple[int, float]]]]] = {}
        self._choices = [_Choice(TextLogprobs(tokenizer)) for _ in range(len(jobs) * self._n)]

    async def events(self, options: StreamOptions | None) -> AsyncGenerator[bytes, None]:
        """Yield server-sent events, one for each piece of a choice."""
        include_usage = options is not None and bool(options.include_usage)
        continuous = options is not None and bool(options.continuous_usage_stats)
        start = b"data: " + encode({**self._head, "choices": []})[:-2].encode()
        end = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        async with aclosing(together(self._jobs)) as deltas:
            async for job, delta in deltas:
                index = job * self._n + delta.index
                text, logprobs = self._take(index, delta)
                if not (text or logprobs or delta.finish_reason):
                    continue
                chunk = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": delta.finish_reason}
                if continuous:
                    end = b',"usage":' + encode(usage_of(self._jobs)).encode() + b"}\n\n"
                yield start + encode(chunk).encode() + b"]" + end
        if include_usage:
            yield start + b'],"usage":' + encode(usage_of(self._jobs)).encode() + b"}\n\n"

    async def whole(self) -> dict[str, Any]:
        """Wait for the end and return a Completion."""
        async with aclosing(together(self._jobs)) as deltas:
            async for job, delta in deltas:
                index = job * self._n + delta.index
                choice = self._choices[index]
                text, logprobs = self._take(index, delta)
                choice.texts.append(text)
                for name, values in (logprobs or {}).items():
                    choice.logprobs.setdefault(name, []).extend(values)
                choice.reason = delta.finish_reason or ""
        choices = [
            {
                "index": index,
                "text": "".join(choice.texts),
                "logprobs": choice.logprobs if self._wants_logprobs else None,
                "finish_reason": choice.reason,
            }
            for index, choice in enumerate(self._choices)
        ]
        return {**self._head, "choices": choices, "usage": usage_of(self._jobs)}

    def _take(self, index: int, delta: Delta) -> tuple[str, dict[str, list[Any]] | None]:
        """Return what `delta` adds to a choice: text and log-probabilities, after an echoed prompt's."""
        choice, text = self._choices[index], delta.text
        tokens: list[int] = []
        logprobs: list[float | None] = []
        tops: list[list[tuple[int, float]]] = []
        if self._echo and not choice.begun:
            choice.begun = True
            prompt = self._jobs[index // self._n].prompt_ids[self._first :]
            text = self._tokenizer.decode(prompt) + text
            if self._wants_logprobs:
                tokens, logprobs, tops = self._prompt_scores(index // self._n, delta)
        if not self._wants_logprobs:
            return text, None
        tokens += delta.token_ids
        # What a tool forced on the model has no log-probability.
        logprobs += [value if chosen else None for value, chosen in zip(delta.logprobs, delta.mask, strict=True)]
        tops += delta.top_logprobs or [[]] * len(delta.token_ids)
        return text, choice.logprobs_of.take(tokens, logprobs, tops)

    def _prompt_scores(
        self, job: int, delta: Delta
    ) -> tuple[list[int], list[float | None], list[list[tuple[int, float]]]]:
        """Return the prompt's tokens with what the model thought of them. Nothing comes before the very first."""
        if delta.prompt_logprobs:
            self._prompt[job] = [None, *delta.prompt_logprobs], [[], *delta.prompt_top_logprobs]
        ids, first = self._jobs[job].prompt_ids, self._first
        logprobs, tops = self._prompt.get(job, ([None], [[]]))
        return list(ids[first:]), logprobs[first:], tops[first:]
