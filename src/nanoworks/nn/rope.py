"""Rotary position embedding, half-split layout (https://arxiv.org/abs/2104.09864; layout of GPT-NeoX and HF)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RoPE(nn.Module):
    """Cosines and sines for a set of positions.

    Args:
        head_dim: features a head, even.
        theta: base of the frequencies.
        sign: +1 rotates by +theta as Llama does, -1 by -theta as nanochat does.
        table_dtype: dtype to which the values are rounded before use (nanochat keeps bfloat16 tables).
    """

    def __init__(self, head_dim: int, *, theta: float, sign: int = 1, table_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.head_dim, self.theta, self.sign, self.table_dtype = head_dim, theta, sign, table_dtype

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(...) integer positions -> cos and sin, each (..., head_dim / 2), for `functional.apply_rope`."""
        channels = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=positions.device)
        inverse_frequency = 1.0 / (self.theta ** (channels / self.head_dim))
        angles = positions.float()[..., None] * inverse_frequency
        return angles.cos().to(self.table_dtype), (self.sign * angles.sin()).to(self.table_dtype)
