"""POST /v1/chat/completions, and the little that nanoworks adds to its answers.

The server runs the model's calculator itself, so such a call is part of the answer and not a request to the client.
`content` holds the answer without the calls. In a stream, `delta.nanoworks = {"type": "python" | "python_output",
"text": ...}` carries a piece of a call; in a complete answer, `message.nanoworks = {"parts": [{"type": "text" |
"python" | "python_output", "text": ...}, ...]}` is all of it in order. A client that sends such a message back as it
came gives the model its own calls to read. Calls of the client's own functions are OpenAI's `tool_calls`.

Of messages, unlike elsewhere, unknown fields are dropped: clients send back answers of any server.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, field_validator, model_validator
from pydantic_core import PydanticCustomError

from nanoworks.engine.grammar import Grammar
from nanoworks.serve.protocol.common import MAX_LOGPROBS, Body, SamplingBody, Sparse, Usage

PartType = Literal["text", "python", "python_output"]
MAX_TOOLS = 128
_CONTENT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                "required": ["type", "text"],
            },
        },
        {"type": "null"},
    ]
}


# ------------------------------------------------------------------------------------------------ request


class Part(BaseModel):
    """A stretch of an answer: plain text, an expression for the calculator, or its result."""

    type: PartType
    text: str


class Parts(BaseModel):
    parts: list[Part]


class CalledFunction(BaseModel):
    name: str
    arguments: str
    """JSON."""


class ToolCall(BaseModel):
    """A call that the model made of one of the client's functions."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(BaseModel):
    """One message of the conversation."""

    model_config = ConfigDict(strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, WithJsonSchema(_CONTENT_SCHEMA)] = None
    nanoworks: Parts | None = None
    tool_calls: list[ToolCall] | None = None
    """Of the assistant; then `content` may be null."""
    tool_call_id: str | None = None
    """Of a tool's result: which call it answers."""

    @field_validator("content", mode="before")
    @classmethod
    def join_text_parts(cls, content: Any) -> Any:
        if not isinstance(content, list):
            return content
        for part in content:
            if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                raise PydanticCustomError("part", 'only parts {"type": "text", "text": "..."} are supported')
        return "".join(part["text"] for part in content)

    @model_validator(mode="after")
    def a_role_has_what_it_needs(self) -> ChatMessage:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise PydanticCustomError("content", "content must be a string; only an assistant's calls stand without")
        if self.role == "tool" and self.tool_call_id is None:
            raise PydanticCustomError("tool_call_id", "a tool's message needs tool_call_id, the call that it answers")
        return self

    def in_house_form(self) -> dict[str, Any]:
        """Return the message as the tokenizer's `render` takes it; calls and results as OpenAI has them."""
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": self.content or ""}
        if self.nanoworks is not None and self.role == "assistant":
            text = "".join(part.text for part in self.nanoworks.parts if part.type == "text")
            # A client that edited `content` means what it wrote there, not the parts it left behind.
            if text == self.content:
                message["content"] = [part.model_dump() for part in self.nanoworks.parts]
        if self.role == "assistant" and self.tool_calls:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.role == "tool":
            message["tool_call_id"] = self.tool_call_id
        return message


class Function(Body):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema; without one the function takes nothing."""
    strict: bool | None = None
    """Without effect: a forced call always keeps to `parameters`, a free one is as the model writes it."""


class Tool(Body):
    type: Literal["function"]
    function: Function


class ChosenFunction(Body):
    name: str


class ToolChoice(Body):
    type: Literal["function"]
    function: ChosenFunction


class JsonSchema(Body):
    """A schema as OpenAI wraps it. `name` and `description` are for the reader; it is always kept strictly."""

    model_config = ConfigDict(populate_by_name=True)

    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    definition: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Body):
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


class ChatRequest(SamplingBody):
    messages: list[ChatMessage] = Field(min_length=1, max_length=10_000)
    max_tokens: int | None = Field(None, ge=1, le=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)
    """The newer name of `max_tokens`. Without either an answer may fill the context."""
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    # Only what asks for nothing.
    functions: list[Any] | None = Field(None, max_length=0)
    function_call: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = Field(None, max_length=1)

    @model_validator(mode="after")
    def fields_agree(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("logprobs", "top_logprobs needs logprobs=true")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise PydanticCustomError("tools", "two tools have the same name")
        if names and self.response_format and self.response_format.type != "text" and self.tool_choice != "none":
            message = "tools cannot be called in an answer of this response_format; leave it out, or tool_choice=none"
            raise PydanticCustomError("tools", message)
        return self


# ------------------------------------------------------------------------------------------------ response


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None


FinishReason = Literal["stop", "length", "tool_calls"]


class AnswerMessage(Sparse):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    annotations: list[Any]
    tool_calls: list[ToolCall] | None = None
    nanoworks: Parts | None = None


class Choice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage


class FunctionDelta(BaseModel):
    name: str | None = None
    arguments: str


class ToolCallDelta(BaseModel):
    """The first of a call has its id and name, those after it more of its arguments."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class AnswerDelta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None
    tool_calls: list[ToolCallDelta] | None = None
    nanoworks: Part | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: AnswerDelta
    logprobs: Logprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
