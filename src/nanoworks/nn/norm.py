"""Root mean square normalisation, learned or plain (https://arxiv.org/abs/1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nanoworks.nn import functional as NF


class RMSNorm(nn.Module):
    """x / rms(x), times a learned weight unless `learned` is False; statistics in float32."""

    def __init__(self, size: int, *, eps: float, learned: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size)) if learned else None

    def forward(self, x: Tensor) -> Tensor:
        return NF.rms_norm(x, self.weight, self.eps)
