"""One streamed request, and when each piece of its answer came."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import h11
import httpx

from nanoworks.common.errors import UserError
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
    """Sends the requests of one load over connections that are kept.

    Spoken with h11 on asyncio's streams: a piece of an answer costs half of what it costs through httpx, and with
    hundreds of streams a tenth. On a machine that it shares with the server, that time would be missing there.
    """

    def __init__(self, load: Load) -> None:
        self._load = load
        self._url = httpx.URL(load.url)
        self._path = self._url.path.rstrip("/") + (
            "/v1/chat/completions" if load.endpoint == "chat" else "/v1/completions"
        )
        self._headers = {"Host": self._url.netloc.decode(), "Content-Type": "application/json", **load.headers}
        self._idle: list[_Connection] = []

    async def close(self) -> None:
        for connection in self._idle:
            connection.writer.close()

    async def ask(self, question: Question) -> Outcome:
        """Send one request and read its answer to the end. A failure is in the outcome, never raised."""
        body = json.dumps(self._body(question.prompt, question.output_tokens)).encode()
        outcome = Outcome(time.perf_counter())
        try:
            await asyncio.wait_for(self._exchange(body, outcome), self._load.timeout)
        except asyncio.TimeoutError:
            outcome.error = f"no whole answer within {self._load.timeout:g} s"
        except (OSError, h11.RemoteProtocolError) as error:
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
                connection.writer.close()
                connection = None
        connection = connection or await self._open()
        try:
            status = await connection.post(self._path, self._headers, body)
            if status == 200:
                await _read(connection, outcome)
            else:
                outcome.error = _message(status, b"".join([data async for data, _ in connection.body()]))
            if connection.reusable():
                self._idle.append(connection)
                return
        except BaseException:
            connection.writer.close()
            raise
        connection.writer.close()

    async def _open(self) -> _Connection:
        secure = self._url.scheme == "https"
        reader, writer = await asyncio.open_connection(
            self._url.host, self._url.port or (443 if secure else 80), ssl=secure or None
        )
        return _Connection(reader, writer)

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


class _Connection:
    """One request at a time over one socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self._reader = reader
        self._http = h11.Connection(h11.CLIENT)
        self._arrived = 0.0

    @property
    def gone(self) -> bool:
        """Whether the server closed it, as it does after some seconds without a request."""
        return self._reader.at_eof()

    async def post(self, path: str, headers: dict[str, str], body: bytes) -> int:
        """Send a request; returns the status of its answer."""
        length = {"Content-Length": str(len(body))}
        request = h11.Request(method="POST", target=path, headers=list({**headers, **length}.items()))
        parts = [self._http.send(part) for part in (request, h11.Data(data=body), h11.EndOfMessage())]
        self.writer.write(b"".join(part for part in parts if part))
        while True:
            event = await self._next()
            if isinstance(event, h11.Response):
                return event.status_code

    async def body(self) -> AsyncIterator[tuple[bytes, float]]:
        """Yield the answer's bytes as they come, and when they did."""
        while not isinstance(event := await self._next(), h11.EndOfMessage):
            if isinstance(event, h11.Data):
                yield bytes(event.data), self._arrived

    def reusable(self) -> bool:
        """Make ready for the next request, if the server keeps the connection."""
        if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        self._http.start_next_cycle()
        return True

    async def _next(self) -> object:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            data = await self._reader.read(2**16)
            self._arrived = time.perf_counter()
            self._http.receive_data(data)
        return event


async def _read(connection: _Connection, outcome: Outcome) -> None:
    """Take the events of a stream apart as they come."""
    rest = b""
    async for data, now in connection.body():
        *events, rest = (rest + data).split(b"\n\n")
        for event in events:
            if not event.startswith(b"data: ") or event == b"data: [DONE]":
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
