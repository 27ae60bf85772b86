"""POST /tokenize and /detokenize, as in vLLM."""

from __future__ import annotations

from pydantic import BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError

from nanoworks.serve.protocol.chat import MAX_TOOLS, ChatMessage, Tool
from nanoworks.serve.protocol.common import WholeBody
from nanoworks.serve.protocol.completions import TokenId


class TokenizeRequest(WholeBody):
    """Either a text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    """Of a conversation."""
    add_special_tokens: bool | None = None
    """A text begins with bos; true by default."""
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def one_of_two(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("prompt", "give either prompt or messages")
        return self


class Tokens(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None


class DetokenizeRequest(WholeBody):
    model: str | None = None
    tokens: list[TokenId]


class Text(BaseModel):
    prompt: str
