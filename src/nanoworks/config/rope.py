"""How rotary embeddings reach beyond the context a model was trained on: Hugging Face's `rope_scaling`.

One class for each `rope_type`, with the keys that it takes; `nn.rope` does the arithmetic. The length that
the scaling starts from, `original_max_position_embeddings`, is filled from the model's own where it is not given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from nanoworks.common.errors import nearest
from nanoworks.config.base import Frozen

ORIGINAL = "original_max_position_embeddings"


class Scaling(Frozen):
    rope_type: str


class Linear(Scaling):
    """Positions divided by `factor` (https://arxiv.org/abs/2306.15595)."""

    rope_type: Literal["linear"] = "linear"
    factor: float = Field(ge=1)


class Dynamic(Scaling):
    """A larger base for longer sequences ("NTK-aware"); up to the original length nothing changes."""

    rope_type: Literal["dynamic"] = "dynamic"
    factor: float = Field(ge=1)
    original_max_position_embeddings: int = Field(gt=0)


class Llama3(Scaling):
    """Low frequencies divided by `factor`, high ones left, a ramp between them (Llama 3.1)."""

    rope_type: Literal["llama3"] = "llama3"
    factor: float = Field(ge=1)
    low_freq_factor: float = Field(gt=0)
    high_freq_factor: float = Field(gt=0)
    original_max_position_embeddings: int = Field(gt=0)

    @model_validator(mode="after")
    def _ramp_rises(self) -> Llama3:
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor {self.low_freq_factor} must be below high_freq_factor {self.high_freq_factor}"
            )
        return self


class Yarn(Scaling):
    """YaRN (https://arxiv.org/abs/2309.00071)."""

    rope_type: Literal["yarn"] = "yarn"
    factor: float = Field(ge=1)
    original_max_position_embeddings: int = Field(gt=0)
    beta_fast: float = Field(default=32, gt=0)
    beta_slow: float = Field(default=1, gt=0)
    attention_factor: float | None = Field(default=None, gt=0)
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


class LongRope(Scaling):
    """A factor for each frequency, one list up to the original length and one beyond (https://arxiv.org/abs/2402.13753)."""

    rope_type: Literal["longrope"] = "longrope"
    short_factor: list[float]
    long_factor: list[float]
    factor: float | None = Field(default=None, ge=1)
    attention_factor: float | None = Field(default=None, gt=0)
    original_max_position_embeddings: int = Field(gt=0)


class Proportional(Scaling):
    """Only the first part of the pairs rotates, at the frequencies it has among all of them."""

    rope_type: Literal["proportional"] = "proportional"
    factor: float = Field(default=1, ge=1)
    partial_rotary_factor: float = Field(default=1, gt=0, le=1)


SCALINGS: dict[str, type[Scaling]] = {
    cls.model_fields["rope_type"].default: cls for cls in (Linear, Dynamic, Llama3, Yarn, LongRope, Proportional)
}


def parse(value: Any) -> Any:
    """The class for the `rope_type` of a mapping; "default" and {} are no scaling."""
    if not isinstance(value, Mapping):
        return value
    values = dict(value)
    kind = values.pop("type", None)  # its name before transformers 4.43
    kind = values.pop("rope_type", kind)
    if kind is None and values:
        raise ValueError(f"rope_type is missing; known: default, {', '.join(SCALINGS)}")
    if kind in (None, "default"):
        return None
    if kind not in SCALINGS:
        raise ValueError(
            f"unknown rope_type {kind!r}{nearest(str(kind), SCALINGS)}; known: default, {', '.join(SCALINGS)}"
        )
    return SCALINGS[kind](**values)


RopeScaling = Annotated[SerializeAsAny[Scaling] | None, BeforeValidator(parse)]


def scaled_theta(theta: float, *, head_dim: int, factor: float) -> float:
    """The base that stretches a context `factor` times before further training ("NTK-aware" scaling of the base).

    The lowest frequency is divided by `factor`, the highest stays: theta * factor ** (head_dim / (head_dim - 2)).
    """
    if factor < 1:
        raise ValueError(f"factor is {factor}; a context is stretched by 1 or more")
    return theta * factor ** (head_dim / (head_dim - 2))
