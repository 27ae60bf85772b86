"""POST /v1/embeddings: the mean of a text's hidden states after the last norm."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from nanoworks.serve.protocol.common import WholeBody
from nanoworks.serve.protocol.completions import TokenIds

Text = Annotated[str, Field(min_length=1)]


class EmbeddingRequest(WholeBody):
    input: Text | Annotated[list[Text], Field(min_length=1)] | TokenIds | Annotated[list[TokenIds], Field(min_length=1)]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = Field(None, max_length=512)
    dimensions: None = None
    """Not supported: the embedding has the model's hidden size."""


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str
    """(hidden_size,) numbers, or base64 of them as little-endian float32."""


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
