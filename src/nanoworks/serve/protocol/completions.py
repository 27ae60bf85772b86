"""POST /v1/completions: a text, or many, continued as they are."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError

from nanoworks.serve.protocol.common import MAX_LOGPROBS, SamplingBody, Usage

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Prompt = str | Annotated[list[str], Field(min_length=1)] | TokenIds | Annotated[list[TokenIds], Field(min_length=1)]
"""One text or token list, or several."""


class CompletionRequest(SamplingBody):
    prompt: Prompt
    max_tokens: int | None = Field(None, ge=0, le=2**31)
    """16 by default, as at OpenAI; 0 with `echo` only reads the prompt."""
    echo: bool | None = None
    """The text begins with the prompt, and `logprobs` with those of its tokens."""
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_special_tokens: bool | None = None
    """A text begins with the tokenizer's bos token, as training texts do; true by default. Token lists are as given."""

    # Only what asks for nothing.
    suffix: Literal[""] | None = None
    best_of: int | None = Field(None, ge=1, le=1024)

    @model_validator(mode="after")
    def only_the_best_of_all(self) -> CompletionRequest:
        if self.best_of not in (None, self.n or 1):
            raise PydanticCustomError("best_of", "best_of is not supported here; leave it out, or make it equal to n")
        return self


class CompletionLogprobs(BaseModel):
    """One entry a token. `text_offset` counts characters from the beginning of the choice's text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class Completion(BaseModel):
    """An answer, and each chunk of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
