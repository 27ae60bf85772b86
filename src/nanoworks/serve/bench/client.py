"""One streamed request, and when each piece of its answer came."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from nanoworks.common.errors import UserError
from nanoworks.serve.bench.connection import Connection
from nanoworks.serve.bench.load import Calibration, Load, Question, text


@dataclass
class Outcome:
    """What became of one request. Times are seconds of `time.perf_counter`."""

    started: float
    pieces: list[float] = field(default_factory=list)
    """When each piece of the answer came, by the client's clock."""
    ended: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""

    @property
    def first(self) -> float | None:
        """Seconds to the first piece."""
        return self.pieces[0] - self.started if self.pieces else None

    @property
    def duration(self) -> float:
        return self.ended - self.started

    @property
    def gaps(self) -> list[float]:
        """Seconds between pieces."""
        return [b - a for a, b in zip(self.pieces, self.pieces[1:], strict=False)]


def server_url(text: str) -> str:
    """`text` without a trailing /v1; UserError when it is no URL."""
    url = text.rstrip("/").removesuffix("/v1")
    if not url.startswith(("http://", "https://")):
        raise UserError(f"{text!r} is no URL; write it as http://127.0.0.1:8000")
    return url


def first_model(url: str, api_key: str) -> str:
    """Ask a server for the name of its model; UserError when it does not say."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        answer = httpx.get(f"{url}/v1/models", headers=headers, timeout=30)
    except httpx.HTTPError as error:
        raise UserError(f"no server answers at {url} ({error}); start it with `nanoworks serve CHECKPOINT`") from None
    if answer.status_code in (401, 403):
        raise UserError(f"{url} asks for a key; give it with --api-key or in NANOWORKS_API_KEY")
    try:
        return str(answer.raise_for_status().json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError):
        raise UserError(f"{url}/v1/models names no model; is this an OpenAI endpoint? Name it with --model") from None


class Client:
    """Sends the requests of one load over connections that are kept."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._url = httpx.URL(load.url)
        path = self._url.path.rstrip("/") + ("/v1/chat/completions" if load.endpoint == "chat" else "/v1/completions")
        headers = {"Host": self._url.netloc.decode(), "Content-Type": "application/json", **load.headers}
        lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        self._head = "".join(f"{line}\r\n" for line in lines).encode("latin-1")
        self._idle: list[Connection] = []

    async def close(self) -> None:
        for connection in self._idle:
            connection.close()

    async def ask(self, question: Question) -> Outcome:
        """Send one request and read its answer to the end. A failure is in the outcome, never raised."""
        body = json.dumps(self._body(question.prompt, question.output_tokens)).encode()
        outcome = Outcome(time.perf_counter())
        try:
            await asyncio.wait_for(self._exchange(body, outcome), self._load.timeout)
        except asyncio.TimeoutError:
            outcome.error = f"no whole answer within {self._load.timeout:g} s"
        except OSError as error:
            outcome.error = f"{type(error).__name__}: {error}".rstrip(": ")
        outcome.ended = time.perf_counter()
        if not outcome.error and not outcome.completion_tokens:
            outcome.completion_tokens = len(outcome.pieces)  # a server that sends no usage
        return outcome

    async def _exchange(self, body: bytes, outcome: Outcome) -> None:
        connection = None
        while connection is None and self._idle:
            connection = self._idle.pop()
            if connection.gone:
                connection = None
        connection = connection or await self._open()
        events = _Events(outcome)
        try:
            status = await connection.post(self._head, body, events.take)
        except BaseException:
            connection.close()
            raise
        if status != 200:
            outcome.error = _message(status, events.other + events.rest)
        if connection.reusable:
            self._idle.append(connection)

    async def _open(self) -> Connection:
        secure = self._url.scheme == "https"
        loop, port = asyncio.get_running_loop(), self._url.port or (443 if secure else 80)
        _, connection = await loop.create_connection(Connection, self._url.host, port, ssl=secure or None)
        return connection

    async def calibrate(self) -> Calibration:
        """Find out how many tokens a prompt of so many words has, from what the server says of two.

        Raises:
            UserError: the server does not answer them.
        """
        rng = random.Random()
        counts = {}
        for words in (4, 12):
            outcome = await self.ask(Question(text(rng, words), 1))
            if outcome.error:
                raise UserError(f"the server does not answer a short request: {outcome.error}")
            if not outcome.prompt_tokens:
                return Calibration(0, 1)  # no usage: take a word for a token
            counts[words] = outcome.prompt_tokens
        per_word = max(0.1, (counts[12] - counts[4]) / 8)
        return Calibration(counts[4] - 4 * per_word, per_word)

    def _body(self, prompt: str, tokens: int) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._load.model,
            "max_tokens": tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._load.exact_output:
            body["min_tokens"] = tokens
        if self._load.temperature is not None:
            body["temperature"] = self._load.temperature
        if self._load.endpoint == "chat":
            return {**body, "messages": [{"role": "user", "content": prompt}]}
        return {**body, "prompt": prompt}


class _Events:
    """Takes the events of a stream apart as they come."""

    def __init__(self, outcome: Outcome) -> None:
        self.other = b""
        """What came besides events: of an answer that is no stream, all but what follows the last blank line."""
        self.rest = b""
        """What is no whole event yet."""
        self._outcome = outcome

    def take(self, data: bytes, now: float) -> None:
        *events, self.rest = (self.rest + data).split(b"\n\n")
        outcome = self._outcome
        for event in events:
            if not event.startswith(b"data: "):
                self.other += event + b"\n\n"
                continue
            if event == b"data: [DONE]":
                continue
            chunk = json.loads(event[6:])
            if "error" in chunk:
                outcome.error = str(chunk["error"].get("message", chunk["error"]))
            if usage := chunk.get("usage"):
                outcome.prompt_tokens = usage.get("prompt_tokens", 0)
                outcome.completion_tokens = usage.get("completion_tokens", 0)
            if any(map(_says_something, chunk.get("choices", ()))):
                outcome.pieces.append(now)


def _says_something(choice: dict[str, Any]) -> bool:
    """Whether a chunk's choice has a piece of the answer, not only a role or a reason."""
    if "text" in choice:
        return bool(choice["text"])
    return any(value for key, value in choice.get("delta", {}).items() if key != "role")


def _message(status: int, body: bytes) -> str:
    try:
        return f"{status}: {json.loads(body)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{status}: {body[:200].decode(errors='replace')}"
