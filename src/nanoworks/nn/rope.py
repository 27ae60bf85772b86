"""Rotary position embedding, half-split layout (https://arxiv.org/abs/2104.09864; layout of GPT-NeoX and HF),
and the ways of scaling it to longer contexts, which are those of Hugging Face's `rope_scaling`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class RoPE(nn.Module):
    """Cosines and sines for a set of positions.

    Args:
        head_dim: features a head, even.
        theta: base of the frequencies.
        sign: +1 rotates by +theta as Llama does, -1 by -theta as nanochat does.
        table_dtype: dtype to which the values are rounded before use (nanochat keeps bfloat16 tables).
        scaling: `rope_type` and the keys of its class in `config.rope`; None leaves the frequencies as they are.
        max_position_embeddings: the context of the model.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        theta: float,
        sign: int = 1,
        table_dtype: torch.dtype = torch.float32,
        scaling: Mapping[str, Any] | None = None,
        max_position_embeddings: int | None = None,
    ) -> None:
        super().__init__()
        self.head_dim, self.theta, self.sign, self.table_dtype = head_dim, theta, sign, table_dtype
        self._keys = dict(scaling or {"rope_type": "default"}, max_position_embeddings=max_position_embeddings)
        self._scale = _SCALES[self._keys.pop("rope_type")]
        self.depends_on_length = self._scale in (_dynamic, _longrope)
        """Whether the same position is rotated otherwise in a longer sequence."""

    def forward(self, positions: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(...) integer positions -> cos and sin, each (..., head_dim / 2), for `functional.apply_rope`.

        `lengths` of the sequences broadcast against `positions`; only some scalings look at them.
        """
        pairs = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=positions.device) / self.head_dim
        frequency, amplitude = self._scale(pairs, lengths, theta=self.theta, head_dim=self.head_dim, **self._keys)
        angles = positions.float()[..., None] * frequency
        cos, sin = angles.cos() * amplitude, angles.sin() * (self.sign * amplitude)
        return cos.to(self.table_dtype), sin.to(self.table_dtype)


# Each takes pairs (D/2,), the exponents 2i / D, and lengths; returns frequencies, (D/2,) or (..., D/2) where they
# depend on the length, and the factor of the cosines and sines.


def _default(pairs: Tensor, lengths: Tensor, *, theta: float, **_: Any) -> tuple[Tensor, float]:
    return 1.0 / theta**pairs, 1.0


def _linear(pairs: Tensor, lengths: Tensor, *, theta: float, factor: float, **_: Any) -> tuple[Tensor, float]:
    return 1.0 / theta**pairs / factor, 1.0


def _dynamic(
    pairs: Tensor,
    lengths: Tensor,
    *,
    theta: float,
    head_dim: int,
    factor: float,
    original_max_position_embeddings: int,
    **_: Any,
) -> tuple[Tensor, float]:
    stretch = (lengths / original_max_position_embeddings).clamp(min=1.0)
    base = theta * (factor * stretch - (factor - 1)) ** (head_dim / (head_dim - 2))
    return 1.0 / base[..., None] ** pairs, 1.0


def _llama3(
    pairs: Tensor,
    lengths: Tensor,
    *,
    theta: float,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
    **_: Any,
) -> tuple[Tensor, float]:
    frequency = 1.0 / theta**pairs
    turns = original_max_position_embeddings * frequency / (2 * math.pi)  # within the original context
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return frequency * (kept + (1 - kept) / factor), 1.0


def _yarn(
    pairs: Tensor,
    lengths: Tensor,
    *,
    theta: float,
    head_dim: int,
    factor: float,
    original_max_position_embeddings: int,
    beta_fast: float,
    beta_slow: float,
    attention_factor: float | None,
    mscale: float | None,
    mscale_all_dim: float | None,
    truncate: bool,
    **_: Any,
) -> tuple[Tensor, float]:
    def pair_of(turns: float) -> float:
        """Index of the pair that makes so many turns within the original context."""
        return head_dim * math.log(original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(beta_fast), pair_of(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    index = torch.arange(len(pairs), dtype=torch.float32, device=pairs.device)
    kept = 1 - ((index - low) / max(high - low, 0.001)).clamp(0, 1)
    frequency = 1.0 / theta**pairs

    def amplitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0

    if attention_factor is None:
        attention_factor = amplitude(1.0)
        if mscale and mscale_all_dim:
            attention_factor = amplitude(mscale) / amplitude(mscale_all_dim)
    return frequency * (kept + (1 - kept) / factor), attention_factor


def _longrope(
    pairs: Tensor,
    lengths: Tensor,
    *,
    theta: float,
    short_factor: list[float],
    long_factor: list[float],
    factor: float | None,
    attention_factor: float | None,
    original_max_position_embeddings: int,
    max_position_embeddings: int,
    **_: Any,
) -> tuple[Tensor, float]:
    short, long = (torch.tensor(f, dtype=torch.float32, device=pairs.device) for f in (short_factor, long_factor))
    divisor = torch.where((lengths > original_max_position_embeddings)[..., None], long, short)
    stretch = factor or max_position_embeddings / original_max_position_embeddings
    if attention_factor is None:
        attention_factor = 1.0
        if stretch > 1:
            attention_factor = math.sqrt(1 + math.log(stretch) / math.log(original_max_position_embeddings))
    return 1.0 / (divisor * theta**pairs), attention_factor


def _proportional(
    pairs: Tensor, lengths: Tensor, *, theta: float, factor: float, partial_rotary_factor: float, **_: Any
) -> tuple[Tensor, float]:
    rotated = int(partial_rotary_factor * len(pairs))
    frequency = 1.0 / theta**pairs / factor
    frequency[rotated:] = 0
    return frequency, 1.0


_SCALES: dict[str, Callable[..., tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "proportional": _proportional,
}
