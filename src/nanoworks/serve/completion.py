"""One chat completion: from the engine's deltas to OpenAI's chunks, and from the chunks to a whole answer."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from nanoworks.engine import AsyncEngine, Delta, SamplingParams
from nanoworks.engine.sampler import NOT_FINITE
from nanoworks.serve.errors import ApiError
from nanoworks.serve.parts import PartSplitter, Piece, add_piece
from nanoworks.serve.protocol import (
    AnswerDelta,
    AnswerMessage,
    ChatCompletion,
    ChatCompletionChunk,
    Choice,
    ChunkChoice,
    Logprobs,
    Part,
    Parts,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from nanoworks.tokenizer import Tokenizer

IMPOSSIBLE = -9999.0  # OpenAI's log-probability of what cannot be: JSON has no minus infinity


class ChatAnswer:
    """An answer under way. Closing the iterator of `chunks` cancels it in the engine."""

    def __init__(
        self,
        engine: AsyncEngine,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        model: str,
        priority: int = 0,
        client: str = "",
        cache_salt: str = "",
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._prompt_ids = prompt_ids
        self._params = params
        self._model = model
        self._order: dict[str, Any] = {"priority": priority, "client": client, "cache_salt": cache_salt}
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._completion_tokens = 0

    async def chunks(self) -> AsyncGenerator[ChatCompletionChunk, None]:
        """Yield for each choice an opening chunk, its pieces as they are made, and the finish reason."""
        splitters = [PartSplitter() for _ in range(self._params.n)]
        for index in range(self._params.n):
            yield self._chunk(ChunkChoice(index=index, delta=AnswerDelta(role="assistant", content="")))
        async with aclosing(self._engine.submit(self._prompt_ids, self._params, **self._order)) as deltas:
            async for delta in deltas:
                if delta.error and delta.error != NOT_FINITE:  # a grammar that is wrong, or too much
                    raise ApiError(400, delta.error, param="response_format")
                if delta.finish_reason == "error":
                    raise ApiError(500, "the model computed values that are not finite; there is no answer")
                if delta.finish_reason == "cancelled":
                    raise ApiError(503, "the server is stopping")
                self._completion_tokens += len(delta.token_ids)
                splitter = splitters[delta.index]
                pieces = splitter.feed(delta.text)
                if delta.finish_reason is not None:
                    pieces += splitter.finish()
                for choice in self._choices(delta, pieces):
                    yield self._chunk(choice)

    async def whole(self) -> ChatCompletion:
        """Wait for the end and return the answer in one piece."""
        parts: list[list[Piece]] = [[] for _ in range(self._params.n)]
        logprobs: list[list[TokenLogprob]] = [[] for _ in range(self._params.n)]
        reasons = [""] * self._params.n
        async with aclosing(self.chunks()) as chunks:
            async for chunk in chunks:
                for choice in chunk.choices:
                    if choice.delta.content:
                        add_piece(parts[choice.index], {"type": "text", "text": choice.delta.content})
                    if choice.delta.nanoworks:
                        add_piece(parts[choice.index], choice.delta.nanoworks.model_dump())
                    if choice.logprobs:
                        logprobs[choice.index] += choice.logprobs.content
                    reasons[choice.index] = choice.finish_reason or ""
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=[
                Choice(
                    index=index,
                    message=_message(parts[index]),
                    logprobs=Logprobs(content=logprobs[index]) if self._params.logprobs is not None else None,
                    finish_reason=reasons[index],
                )
                for index in range(self._params.n)
            ],
            usage=self._usage(),
        )

    def usage_chunk(self) -> ChatCompletionChunk:
        """The last chunk of a stream whose client asked for `stream_options.include_usage`."""
        return self._chunk().model_copy(update={"usage": self._usage()})

    def _choices(self, delta: Delta, pieces: Sequence[Piece]) -> list[ChunkChoice]:
        """A choice for each piece: the first has the log-probabilities, an empty last one the finish."""
        answers = [
            AnswerDelta(content=piece["text"])
            if piece["type"] == "text"
            else AnswerDelta(nanoworks=Part.model_validate(piece))
            for piece in pieces
        ]
        logprobs = self._logprobs(delta)
        if delta.finish_reason is not None or (logprobs and not answers):
            answers.append(AnswerDelta())
        choices = [ChunkChoice(index=delta.index, delta=answer) for answer in answers]
        if choices:
            choices[0].logprobs = logprobs
            choices[-1].finish_reason = delta.finish_reason
        return choices

    def _logprobs(self, delta: Delta) -> Logprobs | None:
        """Log-probabilities of the tokens the model chose; what a tool forced on it has none."""
        if self._params.logprobs is None or not any(delta.mask):
            return None
        tops = delta.top_logprobs or [[]] * len(delta.token_ids)
        tokens = zip(delta.token_ids, delta.logprobs, delta.mask, tops, strict=True)
        return Logprobs(
            content=[
                TokenLogprob(
                    **dict(self._top_logprob(token, logprob)),
                    top_logprobs=[self._top_logprob(*candidate) for candidate in top],
                )
                for token, logprob, sampled, top in tokens
                if sampled
            ]
        )

    def _top_logprob(self, token: int, logprob: float) -> TopLogprob:
        return TopLogprob(
            token=self._tokenizer.decode([token]),
            logprob=logprob if math.isfinite(logprob) else IMPOSSIBLE,
            bytes=list(self._tokenizer.decode_bytes([token])),
        )

    def _chunk(self, *choices: ChunkChoice) -> ChatCompletionChunk:
        return ChatCompletionChunk(id=self._id, created=self._created, model=self._model, choices=list(choices))

    def _usage(self) -> Usage:
        prompt, completion = len(self._prompt_ids), self._completion_tokens
        return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


def _message(parts: list[Piece]) -> AnswerMessage:
    content = "".join(part["text"] for part in parts if part["type"] == "text")
    tools = any(part["type"] != "text" for part in parts)
    return AnswerMessage(content=content, nanoworks=Parts.model_validate({"parts": parts}) if tools else None)
