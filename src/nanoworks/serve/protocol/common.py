"""What several endpoints share: the fields that steer sampling, the usage, the errors."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    WithJsonSchema,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from nanoworks.engine import SamplingParams

MAX_LOGPROBS = 20
MAX_STOPS = 16
_TOKEN_ID = re.compile(r"\d{1,9}")
_BIAS_SCHEMA = {
    "anyOf": [
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": 1024,
        },
        {"type": "null"},
    ]
}
_STOP_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": MAX_STOPS},
        {"type": "null"},
    ]
}


class Body(BaseModel):
    """A part of a request: closed to unknown fields, and strict about types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class WholeBody(Body):
    """The outermost object of a request."""

    @model_validator(mode="before")
    @classmethod
    def text_is_unicode(cls, body: Any) -> Any:
        """JSON can spell half a surrogate pair, which no tokenizer takes."""
        try:
            if isinstance(body, dict):
                json.dumps(body, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            message = "the text has half of a surrogate pair, which is no Unicode; send whole characters"
            raise PydanticCustomError("unicode", message) from None
        return body


class StreamOptions(Body):
    include_usage: bool | None = None
    """A last chunk without choices says what was used."""
    continuous_usage_stats: bool | None = None
    """Every chunk says what was used so far, as in vLLM."""
    include_obfuscation: Literal[False] | None = None


class SamplingBody(WholeBody):
    """How to continue; null is the engine's default. `SamplingParams` says what each does."""

    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[dict[int, float] | None, WithJsonSchema(_BIAS_SCHEMA)] = None
    min_tokens: int | None = Field(None, ge=0, le=2**31)
    ignore_eos: bool | None = None
    n: int | None = Field(None, ge=1, le=1024)
    stop: Annotated[list[str] | None, WithJsonSchema(_STOP_SCHEMA)] = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=512)
    """Waiting requests of different users take turns."""
    prompt_cache_key: str | None = Field(None, max_length=512)
    """Only requests of one key share what was computed for the beginning of their prompts."""
    priority: int | None = Field(None, ge=-100, le=100)
    """The lower, the sooner, as in vLLM."""

    # OpenAI's bookkeeping: without effect.
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: Literal["auto", "default", "flex", "priority", "scale"] | None = None
    safety_identifier: str | None = None
    prompt_cache_retention: Literal["in-memory", "in_memory", "24h"] | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def one_stop_is_a_list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @field_validator("stop")
    @classmethod
    def stops_are_few_and_not_empty(cls, stop: list[str] | None) -> list[str] | None:
        if stop and "" in stop:
            raise PydanticCustomError("stop", "a stop string must not be empty")
        if stop and len(stop) > MAX_STOPS:
            raise PydanticCustomError("stop", "at most {most} stop strings are allowed", {"most": MAX_STOPS})
        return stop

    @field_validator("logit_bias", mode="before")
    @classmethod
    def token_ids_are_numbers(cls, bias: Any) -> Any:
        """JSON's names are strings, and these are token ids."""
        if not isinstance(bias, dict):
            return bias
        if len(bias) > 1024:
            raise PydanticCustomError("logit_bias", "at most 1024 tokens can have a bias")
        for token, value in bias.items():
            if not (isinstance(token, str) and _TOKEN_ID.fullmatch(token)):
                raise PydanticCustomError("logit_bias", "{token} is not a token id", {"token": repr(token)[:50]})
            if isinstance(value, int | float) and not -100 <= value <= 100:
                raise PydanticCustomError("logit_bias", "a bias must be from -100 to 100")
        return {int(token): value for token, value in bias.items()}

    def sampling(self, **more: Any) -> SamplingParams:
        """Return what was asked for, and `more`, for the engine."""
        asked = {name: getattr(self, name) for name in _PASSED_ON}
        asked["stop"] = None if self.stop is None else tuple(self.stop)
        return SamplingParams(**{name: value for name, value in {**asked, **more}.items() if value is not None})

    @property
    def order(self) -> dict[str, Any]:
        """Arguments of `Generation`: its place in the queue and whose cache it shares."""
        return {
            "priority": -(self.priority or 0),  # the engine's are the other way round
            "user": self.user or "",
            "cache_salt": self.prompt_cache_key or "",
        }


_PASSED_ON = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "min_tokens",
    "ignore_eos",
    "n",
    "seed",
)


class Sparse(BaseModel):
    """A type whose fields without a value are left out of the JSON."""

    @model_serializer(mode="wrap")
    def without_nulls(self, handler: Any) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value is not None}


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail
