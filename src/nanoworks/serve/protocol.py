"""The wire format: OpenAI's chat completions as pydantic types, and the little that nanoworks adds.

Two additions, both ignored by ordinary clients:

- `top_k`, `min_p`, `repetition_penalty`, `min_tokens` and `priority` in the request.
- Tool calls. The server runs the model's calculator itself, so a call is part of the answer and not a request
  to the client. `content` holds the answer without the calls. In a stream, `delta.nanoworks =
  {"type": "python" | "python_output", "text": ...}` carries a piece of a call; in a complete answer,
  `message.nanoworks = {"parts": [{"type": "text" | "python" | "python_output", "text": ...}, ...]}` is all of
  it in order. A client that sends such a message back as it came gives the model its own calls to read.

A field that is not known, or that asks for something this server does not do, is an error: nothing is
silently ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_serializer, model_validator
from pydantic_core import PydanticCustomError

from nanoworks.engine.grammar import Grammar

PartType = Literal["text", "python", "python_output"]

# Accepted without effect: they concern the caller's bookkeeping, never the answer.
BOOKKEEPING = {"metadata", "store", "service_tier", "safety_identifier"}

# Not done by this server: accepted only with the value that asks for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
}


# ------------------------------------------------------------------------------------------------ request


class Part(BaseModel):
    """A stretch of an answer: plain text, an expression for the calculator, or its result."""

    type: PartType
    text: str


class Parts(BaseModel):
    parts: list[Part]


class ChatMessage(BaseModel):
    """One message of the conversation. Fields of OpenAI's answers that mean nothing here are dropped."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str
    nanoworks: Parts | None = None

    @field_validator("content", mode="before")
    @classmethod
    def join_text_parts(cls, content: Any) -> Any:
        if not isinstance(content, list):
            return content
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise PydanticCustomError("part", 'only parts {"type": "text", "text": "..."} are supported')
        return "".join(Part.model_validate(part).text for part in content)

    def in_house_form(self) -> dict[str, Any]:
        """Return the message as the tokenizer's `render` takes it."""
        role = "system" if self.role == "developer" else self.role
        if self.nanoworks is not None and self.role == "assistant":
            text = "".join(part.text for part in self.nanoworks.parts if part.type == "text")
            # A client that edited `content` means what it wrote there, not the parts it left behind.
            if text == self.content:
                return {"role": role, "content": [part.model_dump() for part in self.nanoworks.parts]}
        return {"role": role, "content": self.content}


class StreamOptions(BaseModel):
    include_usage: bool = False


class JsonSchema(BaseModel):
    """A schema as OpenAI wraps it. `name` and `description` are for the reader; it is always kept strictly."""

    model_config = ConfigDict(populate_by_name=True)

    name: str = ""
    description: str = ""
    strict: bool = True
    definition: dict[str, Any] = Field(alias="schema")


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def a_schema_belongs_to_its_type(self) -> ResponseFormat:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            message = 'json_schema is needed with {"type": "json_schema"}, and only there'
            raise PydanticCustomError("response_format", message)
        return self

    def grammar(self) -> Grammar | None:
        """UserError when the schema is too large."""
        if self.json_schema is not None:
            return Grammar.json_schema(self.json_schema.definition)
        return Grammar("json_object") if self.type == "json_object" else None


class ChatRequest(BaseModel):
    """The body of POST /v1/chat/completions. A field given as null counts as not given."""

    model_config = ConfigDict(extra="forbid")

    messages: list[ChatMessage] = Field(min_length=1)
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] = Field({}, max_length=1024)
    min_tokens: int = Field(0, ge=0)
    response_format: ResponseFormat = ResponseFormat()
    n: int = Field(1, ge=1, le=64)
    stop: list[str] = Field([], max_length=16)
    seed: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str = Field("", max_length=512)
    """Waiting requests of different users take turns."""
    prompt_cache_key: str = Field("", max_length=512)
    """Only requests of one key share what was computed for the beginning of their conversations."""
    priority: int = Field(0, ge=-100, le=100)
    """The lower, the sooner, as in vLLM."""

    @model_validator(mode="before")
    @classmethod
    def drop_fields_without_effect(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        kept = {}
        for name, value in body.items():
            if value is None or name in BOOKKEEPING:
                continue
            if name in UNSUPPORTED:
                if value in UNSUPPORTED[name]:
                    continue
                raise PydanticCustomError("unsupported", "{name} is not supported here", {"name": name})
            kept[name] = value
        return kept

    @field_validator("stop", mode="before")
    @classmethod
    def one_stop_is_a_list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @field_validator("stop")
    @classmethod
    def stops_are_not_empty(cls, stop: list[str]) -> list[str]:
        if "" in stop:
            raise PydanticCustomError("stop", "a stop string must not be empty")
        return stop

    @model_validator(mode="after")
    def top_logprobs_needs_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("logprobs", "top_logprobs needs logprobs=true")
        return self


# ------------------------------------------------------------------------------------------------ response


class Sparse(BaseModel):
    """A type whose fields without a value are left out of the JSON."""

    @model_serializer(mode="wrap")
    def without_nulls(self, handler: Any) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value is not None}


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    content: list[TokenLogprob]


class AnswerMessage(Sparse):
    role: Literal["assistant"] = "assistant"
    content: str
    nanoworks: Parts | None = None


class Choice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: str


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class AnswerDelta(Sparse):
    role: Literal["assistant"] | None = None
    content: str | None = None
    nanoworks: Part | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: AnswerDelta
    logprobs: Logprobs | None = None
    finish_reason: str | None = None


class ChatCompletionChunk(Sparse):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "nanoworks"
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    error: ErrorDetail
