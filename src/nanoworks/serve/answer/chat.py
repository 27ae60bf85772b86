"""One chat completion: its chunks while the engine works, or the whole answer."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from nanoworks.engine import Delta
from nanoworks.serve.answer.encode import encode, usage_of
from nanoworks.serve.answer.logprobs import chat_logprobs
from nanoworks.serve.answer.tools import Fields, ToolReader
from nanoworks.serve.generation import Generation
from nanoworks.serve.parts import PartSplitter, Piece, add_piece
from nanoworks.serve.protocol.common import StreamOptions
from nanoworks.tokenizer import Tokenizer


class ChatAnswer:
    """An answer under way; read either `events` or `whole`, once.

    Args:
        job: its generation.
        tokenizer: of the model.
        head: the fields that name the answer's model.
        tool_reader: makes a reader of a sample's calls; None from it: there can be none.
    """

    def __init__(
        self, job: Generation, tokenizer: Tokenizer, head: dict[str, Any], tool_reader: Callable[[], ToolReader | None]
    ) -> None:
        self._job, self._tokenizer = job, tokenizer
        self._head = {"created": int(time.time()), **head}
        self._id = f"chatcmpl-{job.request_id}"
        self._wants_logprobs = job.params.logprobs is not None
        self._samples = [_Sample(tool_reader()) for _ in range(job.params.n)]

    async def events(self, options: StreamOptions | None) -> AsyncGenerator[bytes, None]:
        """Yield server-sent events: for each choice an opening chunk, its pieces as they come, the finish reason."""
        include_usage = options is not None and bool(options.include_usage)
        continuous = options is not None and bool(options.continuous_usage_stats)
        head = {"id": self._id, "object": "chat.completion.chunk", **self._head, "choices": []}
        start = b"data: " + encode(head)[:-2].encode()
        end = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        opened = False
        async with aclosing(self._job.deltas()) as deltas:
            async for delta in deltas:
                chunks = []
                if not opened:
                    opened = True
                    role = {"role": "assistant", "content": "", "refusal": None}
                    chunks = [_choice(index, role, None, None) for index in range(len(self._samples))]
                chunks += self._choices(delta)
                if continuous:
                    end = b',"usage":' + encode(usage_of([self._job])).encode() + b"}\n\n"
                if chunks:
                    yield b"".join([start + chunk.encode() + b"]" + end for chunk in chunks])
        if include_usage:
            yield start + b'],"usage":' + encode(usage_of([self._job])).encode() + b"}\n\n"

    async def whole(self) -> dict[str, Any]:
        """Wait for the end and return a ChatCompletion."""
        texts: list[list[str]] = [[] for _ in self._samples]
        logprobs: list[list[dict[str, Any]]] = [[] for _ in self._samples]
        reasons = [""] * len(self._samples)
        async with aclosing(self._job.deltas()) as deltas:
            async for delta in deltas:
                texts[delta.index].append(delta.text)
                if self._wants_logprobs:
                    logprobs[delta.index] += chat_logprobs(delta, self._tokenizer)
                if delta.finish_reason is not None:
                    reasons[delta.index] = delta.finish_reason
        choices = []
        for index, sample in enumerate(self._samples):
            message = _message(sample.feed("".join(texts[index]), last=True))
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": {"content": logprobs[index], "refusal": None} if self._wants_logprobs else None,
                    "finish_reason": sample.reason(reasons[index]),
                }
            )
        return {
            "id": self._id,
            "object": "chat.completion",
            **self._head,
            "choices": choices,
            "usage": usage_of([self._job]),
        }

    def _choices(self, delta: Delta) -> list[str]:
        """The JSON of a choice for each piece: the first has the log-probabilities, an empty last one the finish."""
        sample, reason = self._samples[delta.index], delta.finish_reason
        pieces = sample.feed(delta.text, last=reason is not None)
        entries = chat_logprobs(delta, self._tokenizer) if self._wants_logprobs else []
        logprobs = {"content": entries, "refusal": None} if entries else None
        if reason is not None or (logprobs and not pieces):
            pieces.append({})
        last = len(pieces) - 1
        return [
            _choice(
                delta.index,
                fields,
                logprobs if i == 0 else None,
                sample.reason(reason) if reason is not None and i == last else None,
            )
            for i, fields in enumerate(pieces)
        ]


class _Sample:
    """One choice: splits its text into what clients read, calculations, and calls of the client's functions."""

    def __init__(self, tools: ToolReader | None) -> None:
        self._splitter = PartSplitter()
        self._tools = tools

    def feed(self, text: str, *, last: bool) -> list[Fields]:
        pieces = self._splitter.feed(text)
        if last:
            pieces += self._splitter.finish()
        found: list[Fields] = []
        for piece in pieces:
            if piece["type"] != "text":
                found.append({"nanoworks": piece})
            elif self._tools is None:
                found.append({"content": piece["text"]})
            else:
                found += self._tools.feed(piece["text"])
        if last and self._tools is not None:
            found += self._tools.finish()
        return found

    def reason(self, reason: str) -> str:
        return reason if self._tools is None else self._tools.reason(reason)


def _choice(index: int, fields: Fields, logprobs: dict[str, Any] | None, reason: str | None) -> str:
    scores = "null" if logprobs is None else encode(logprobs)
    ending = "null" if reason is None else f'"{reason}"'
    return f'{{"index":{index},"delta":{encode(fields)},"logprobs":{scores},"finish_reason":{ending}}}'


def _message(pieces: list[Fields]) -> dict[str, Any]:
    """Join the pieces of a choice into its message."""
    content = "".join(piece.get("content", "") for piece in pieces)
    calls: list[dict[str, Any]] = []
    parts: list[Piece] = []
    for piece in pieces:
        for call in piece.get("tool_calls", ()):
            if "id" in call:
                calls.append({"id": call["id"], "type": call["type"], "function": dict(call["function"])})
            else:
                calls[-1]["function"]["arguments"] += call["function"]["arguments"]
        if "content" in piece:
            add_piece(parts, {"type": "text", "text": piece["content"]})
        if "nanoworks" in piece:
            add_piece(parts, piece["nanoworks"])
    message: dict[str, Any] = {
        "role": "assistant",
        "content": content or (None if calls else ""),
        "refusal": None,
        "annotations": [],
    }
    if calls:
        message["tool_calls"] = calls
    if any(part["type"] != "text" for part in parts):
        message["nanoworks"] = {"parts": parts}
    return message
