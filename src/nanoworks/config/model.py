"""What every model family's configuration has in common, in Hugging Face's spelling.

A family subclasses `ModelConfig` in its own file, adds its fields and validates them; `model_type` tells
the families apart. `to_hf` and `from_hf` write and read `config.json`; keys of a foreign `config.json`
that the family does not know are kept in `unknown` and written back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from nanoworks.config.base import Frozen

PositiveInt = Field(gt=0)


class ModelConfig(Frozen):
    """Shape of a decoder-only transformer. Sizes are counts of features, heads, layers or tokens."""

    model_type: str
    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    max_position_embeddings: int = Field(gt=0)
    rms_norm_eps: float = Field(gt=0)
    rope_theta: float = Field(gt=0)
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    unknown: dict[str, Any] = Field(default_factory=dict, exclude=True)

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, values: Any) -> Any:
        """Fill what follows from the rest: head_dim, key/value heads."""
        if isinstance(values, dict):
            values = dict(values)
            heads = values.get("num_attention_heads")
            if heads is not None and values.get("num_key_value_heads") is None:
                values["num_key_value_heads"] = heads
            hidden = values.get("hidden_size")
            if isinstance(heads, int) and isinstance(hidden, int) and heads > 0 and values.get("head_dim") is None:
                if hidden % heads:
                    raise ValueError(f"hidden_size {hidden} is not divisible by num_attention_heads {heads}")
                values["head_dim"] = hidden // heads
        return values

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embeddings rotate pairs")
        return self

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Build from the mapping of a `config.json`; keys of no concern to us are kept in `unknown`."""
        values = dict(raw)
        rope = values.pop("rope_parameters", None) or {}
        if "rope_theta" in rope:
            values["rope_theta"] = rope["rope_theta"]
        known = {k: v for k, v in values.items() if k in cls.model_fields and v is not None and k != "unknown"}
        unknown = {k: v for k, v in values.items() if k not in cls.model_fields}
        return cls(**known, unknown=unknown)

    def to_hf(self) -> dict[str, Any]:
        """Return the mapping that Hugging Face's `config.json` holds for this model."""
        own = self.model_dump(mode="json", exclude_none=True)
        # without pad_token_id transformers falls back to a family default that is an ordinary token of ours
        return {"pad_token_id": None, **self.unknown, **own, "architectures": [self.hf_architecture]}

    @property
    def hf_architecture(self) -> str:
        """Name of the `transformers` class that loads this model."""
        raise NotImplementedError
