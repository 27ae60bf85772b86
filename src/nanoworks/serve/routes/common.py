"""What several routes need."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel

from nanoworks.serve.errors import ApiError
from nanoworks.serve.state import ServerState

T = TypeVar("T")

_LONG_TEXT = 10_000  # characters that are tokenized in a few milliseconds
_HUGE_TEXT = 200_000  # and in a tenth of a second


async def beside_the_loop(size: int, work: Callable[[], T]) -> T:
    """Return what `work` returns; with a text of many characters (`size`) it goes to a thread, so that every other
    stream goes on meanwhile."""
    return work() if size < _LONG_TEXT else await asyncio.to_thread(work)


def check_size(size: int, state: ServerState, *, param: str) -> None:
    """Raise ApiError 400 when a text of `size` characters cannot fit into the context, however it is tokenized, and to
    find out how many tokens it has would take long."""
    most = state.engine.max_context * state.longest_token
    if size > max(most, _HUGE_TEXT):
        raise ApiError(
            400,
            f"{param}: {size} characters are more than the model's context of {state.engine.max_context} tokens can "
            f"hold, {most} at most; shorten it",
            param=param,
            code="context_length_exceeded",
        )


async def prompts_of(given: str | Sequence[Any], state: ServerState, *, param: str, bos: bool) -> list[list[int]]:
    """Return the token ids of each prompt in `given`: a text, token ids, or a list of either.

    Args:
        param: the field they came in.
        bos: whether a text begins with the tokenizer's bos.
    """
    prompts: Sequence[Any] = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    if len(prompts) > state.settings.max_prompts:
        most = state.settings.max_prompts
        raise ApiError(400, f"{param}: {len(prompts)} were given, at most {most} can be in one request", param=param)

    def encode() -> list[list[int]]:
        return [state.tokenizer.encode(p, bos=bos) if isinstance(p, str) else list(p) for p in prompts]

    for prompt in prompts:
        if isinstance(prompt, str):
            check_size(len(prompt), state, param=param)
    encoded = await beside_the_loop(sum(map(len, prompts)), encode)
    if not all(encoded):
        raise ApiError(400, f"{param}: must not be empty", param=param)
    return encoded


def check_length(prompt: Sequence[int], state: ServerState, *, room: int, param: str) -> None:
    """Raise ApiError 400 unless `prompt` and `room` more tokens fit into the context."""
    context = state.engine.max_context
    if len(prompt) + room > context:
        raise ApiError(
            400,
            f"{param}: {len(prompt)} tokens are more than the model's context of {context} holds"
            + (", the answer included; shorten it" if room else "; shorten it"),
            param=param,
            code="context_length_exceeded",
        )


def check_n(n: int | None, state: ServerState) -> None:
    """Raise ApiError 400 when more answers are asked for than the operator allows."""
    if n is not None and n > state.settings.max_n:
        raise ApiError(400, f"n: at most {state.settings.max_n} answers can be asked for at once", param="n")


def documented(answer: type[BaseModel], *, chunk: type[BaseModel] | None = None) -> dict[int | str, dict[str, Any]]:
    """Return what the API's document says of the responses of a route that builds them itself."""
    content: dict[str, Any] = {"model": answer, "description": "the answer"}
    if chunk is not None:
        content["content"] = {
            "text/event-stream": {
                "schema": {
                    "type": "object",
                    "properties": {"data": {"type": "string"}, "event": {"const": "message"}},
                    "required": ["data"],
                    "description": f"The data of each event is a {chunk.__name__} in JSON, or an error; the last says "
                    "[DONE].",
                }
            }
        }
    return {200: content}
