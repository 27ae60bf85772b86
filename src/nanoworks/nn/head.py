"""The end of every decoder: final norm, projection to the vocabulary, optional soft cap, and the losses
that need the logits, computed without ever holding the logits of all tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nanoworks.nn.cross_entropy import linear_cross_entropy, token_logprobs
from nanoworks.nn.linear import Linear


class Head(nn.Module):
    """Final norm and lm_head. `softcap` c bounds the logits smoothly: c * tanh(logits / c)."""

    def __init__(self, norm: nn.Module, lm_head: Linear, *, softcap: float | None = None) -> None:
        super().__init__()
        self.norm, self.lm_head, self.softcap = norm, lm_head, softcap

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., hidden_size) -> (..., vocab_size) float32 logits."""
        logits = self.lm_head(self.norm(hidden)).float()
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def loss(self, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of negative log-likelihoods, a float32 scalar; shapes (..., C), (...), (...)."""
        x, weight = self._operands(hidden)
        return linear_cross_entropy(x, weight, targets.reshape(-1), weights.reshape(-1), softcap=self.softcap)

    def logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Log-probability of each target, float32, in the shape of `targets`; differentiable."""
        x, weight = self._operands(hidden)
        return token_logprobs(x, weight, targets.reshape(-1), softcap=self.softcap).view_as(targets)

    def _operands(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(hidden).flatten(0, -2)
        return x.to(self.lm_head.compute_dtype or x.dtype), self.lm_head.weight
