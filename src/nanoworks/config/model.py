"""What every model family's configuration has in common, in Hugging Face's spelling.

A family subclasses `ModelConfig` in its own file, adds its fields and validates them; `model_type` tells
the families apart. `to_hf` and `from_hf` write and read `config.json`; a foreign one is kept in `raw`, and
what is written back is the same but for the fields that were changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, get_args

from pydantic import Field, ValidationError, field_validator, model_validator

from nanoworks.common.errors import UserError
from nanoworks.common.validation import explain
from nanoworks.config.base import Frozen
from nanoworks.config.rope import ORIGINAL, SCALINGS, RopeScaling


class ModelConfig(Frozen):
    """Shape of a decoder-only transformer. Sizes are counts of features, heads, layers or tokens."""

    other_spellings: ClassVar[Mapping[str, str]] = {}
    """Fields that some `config.json` spell otherwise: our name -> theirs."""

    model_type: str
    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    max_position_embeddings: int = Field(gt=0)
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling = None
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    raw: dict[str, Any] = Field(default_factory=dict, exclude=True, repr=False)
    """The `config.json` that this was read from."""

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, values: Any) -> Any:
        """Fill what follows from the rest: head_dim, key/value heads, the length that RoPE is scaled from."""
        if isinstance(values, dict):
            values = dict(values)
            heads = values.get("num_attention_heads")
            if heads is not None and values.get("num_key_value_heads") is None:
                values["num_key_value_heads"] = heads
            if values.get("head_dim") is None and cls.model_fields["head_dim"].is_required():
                values["head_dim"] = _head_dim(values.get("hidden_size"), heads)
        return values

    @model_validator(mode="before")
    @classmethod
    def _scaling_starts_at_the_context(cls, values: Any) -> Any:
        """A scaling that does not say from which length it stretches means the model's own."""
        if isinstance(values, dict) and isinstance(values.get("rope_scaling"), Mapping):
            scaling = dict(values["rope_scaling"])
            kind = SCALINGS.get(str(scaling.get("rope_type", scaling.get("type"))))
            if kind is not None and ORIGINAL in kind.model_fields:
                scaling.setdefault(ORIGINAL, values.get("max_position_embeddings"))
                values = {**values, "rope_scaling": scaling}
        return values

    @field_validator("rms_norm_eps", "rope_theta")
    @classmethod
    def _positive(cls, value: float) -> float:
        """Families state these again, with a default of their own."""
        if not value > 0:
            raise ValueError("Input should be greater than 0")
        return value

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embeddings rotate pairs")
        for name in ("short_factor", "long_factor"):
            factors = getattr(self.rope_scaling, name, None)
            if factors is not None and len(factors) != self.head_dim // 2:
                raise ValueError(
                    f"rope_scaling.{name} has {len(factors)} factors; head_dim {self.head_dim} has "
                    f"{self.head_dim // 2} frequencies"
                )
        return self

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Build from the mapping of a `config.json`, in the spelling of transformers 4 or 5."""
        rope = dict(raw.get("rope_parameters") or {})
        values = {"rope_scaling": rope, **rope} if rope else dict(raw)
        values = {**raw, "rope_scaling": _scaling(raw, values), "rope_theta": values.get("rope_theta")}
        values.update({ours: raw[theirs] for ours, theirs in cls.other_spellings.items() if theirs in raw})
        known = {
            name: values[name]
            for name, field in cls.model_fields.items()
            if name in values
            and name != "raw"
            and (values[name] is not None or type(None) in get_args(field.annotation))
        }
        return cls(**known, raw=dict(raw))

    def to_hf(self) -> dict[str, Any]:
        """Return the mapping that Hugging Face's `config.json` holds for this model."""
        own = self.model_dump(mode="json", exclude_none=True)
        if not self.raw:
            # without pad_token_id transformers falls back to a family default that is an ordinary token of ours
            return {"pad_token_id": None, **own, "architectures": [self.hf_architecture]}
        before = type(self).from_hf(self.raw).model_dump(mode="json", exclude_none=True)
        changed = {key: own.get(key) for key in own.keys() | before.keys() if own.get(key) != before.get(key)}
        written = dict(self.raw)
        if written.get("rope_parameters") and changed.keys() & {"rope_theta", "rope_scaling"}:
            changed.pop("rope_scaling", None)
            theta = changed.pop("rope_theta", own["rope_theta"])
            written["rope_parameters"] = {"rope_type": "default", **own.get("rope_scaling", {}), "rope_theta": theta}
        theirs = {ours: other for ours, other in self.other_spellings.items() if other in self.raw}
        changed = {theirs.get(key, key): value for key, value in changed.items()}
        return {"architectures": [self.hf_architecture], **written, **changed}

    def changed(self, changes: Mapping[str, Any]) -> ModelConfig:
        """A copy with `changes`, validated as a whole.

        Raises:
            UserError: an unknown key, or a value that does not fit the others.
        """
        try:
            return type(self)(**{**self.model_dump(exclude_none=True), **changes}, raw=self.raw)
        except ValidationError as error:
            raise UserError(explain(error, type(self), prefix="model")) from None

    @property
    def hf_architecture(self) -> str:
        """Name of the `transformers` class that loads this model."""
        raise NotImplementedError


def _head_dim(hidden_size: Any, heads: Any) -> int:
    """Features a head, where the config does not say. A size that is no positive number is for its own field to
    report; 2 stands in for what follows from it."""
    try:
        hidden_size, heads = int(hidden_size), int(heads)
    except (TypeError, ValueError, OverflowError):
        return 2
    if hidden_size <= 0 or heads <= 0:
        return 2
    if hidden_size % heads:
        raise ValueError(
            f"hidden_size {hidden_size} is not divisible by num_attention_heads {heads}; "
            "change one of them, or give head_dim"
        )
    return hidden_size // heads


def _scaling(raw: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `rope_scaling` that `raw` means, without the keys that are ours elsewhere."""
    given = rope.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise UserError(f"config.json.rope_scaling: a mapping with rope_type and its keys is expected (got {given!r})")
    scaling = {k: v for k, v in given.items() if k != "rope_theta"}
    partial = scaling.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if scaling.get("rope_type", scaling.get("type", "default")) != "proportional":
        scaling.pop("partial_rotary_factor", None)
        if partial not in (None, 1, 1.0):
            raise UserError(
                f"config.json.partial_rotary_factor: heads that rotate in part are not supported (got {partial!r})"
            )
    return None if scaling.get("rope_type", scaling.get("type")) == "default" else scaling or None
