"""Medusa heads: small modules that guess several tokens ahead from one hidden state (Medusa-1,
https://arxiv.org/abs/2401.10774).

Where the backbone's own head predicts token t+1 from the hidden state at t, head k (from 0) predicts token t+2+k. A
head is residual blocks, x + silu(Wx + b), and a projection to the vocabulary: the backbone's own one, or one that the
head owns as in the paper. W and b start at zero and an own projection as the backbone's, so an untrained head says
what the backbone says.

Shapes: N positions, K heads, C hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoworks.nn.cross_entropy import linear_cross_entropy
from nanoworks.nn.head import Head
from nanoworks.nn.linear import Linear


class ResidualBlock(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = Linear(hidden_size, hidden_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))


class MedusaHeads(nn.Module):
    """Args:
    vocab_size: gives every head its own (V, C) projection; None lets all of them use the backbone's, which costs no
        memory and, where weights are read once for all heads, next to no time.
    """

    def __init__(self, hidden_size: int, num_heads: int, *, num_layers: int = 1, vocab_size: int | None = None) -> None:
        super().__init__()
        self.num_heads, self.num_layers = num_heads, num_layers
        self.blocks = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(hidden_size) for _ in range(num_layers))) for _ in range(num_heads)
        )
        owners = 0 if vocab_size is None else num_heads
        self.lm_heads = nn.ModuleList(Linear(hidden_size, vocab_size or 0, bias=False) for _ in range(owners))

    @torch.no_grad()
    def copy_unembedding(self, weight: Tensor) -> None:
        """Let own projections begin as `weight` (V, C)."""
        for parameter in self.lm_heads.parameters():
            parameter.copy_(weight)

    def logits(self, hidden: Tensor, head: Head) -> Tensor:
        """hidden (N, C) as the decoder returns it, `head` the backbone's -> (N, K, V) float32 logits."""
        x = head.norm(hidden)
        features = torch.stack([block(x) for block in self.blocks], dim=-2)
        if not self.lm_heads:
            logits = head.lm_head(features).float()
        else:
            parts = [own(features[..., k, :]) for k, own in enumerate(self.lm_heads)]
            logits = torch.stack(parts, dim=-2).float()
        return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)

    def losses(self, hidden: Tensor, head: Head, targets: Tensor, weights: Tensor) -> list[Tensor]:
        """Weighted sums of negative log-likelihoods, a float32 scalar for each head, without ever holding all logits.

        hidden (N, C) as the decoder returns it; targets and weights (K, N): what head k should say, and how much it
        counts.
        """
        x = head.norm(hidden)
        losses = []
        for k, block in enumerate(self.blocks):
            projection = cast("Linear", self.lm_heads[k]) if self.lm_heads else head.lm_head
            features = block(x)
            features = features.to(head.lm_head.compute_dtype or features.dtype)
            losses.append(
                linear_cross_entropy(features, projection.weight, targets[k], weights[k], softcap=head.softcap)
            )
        return losses


def shifted(targets: Tensor, weights: Tensor, documents: Tensor | None, num_heads: int) -> tuple[Tensor, Tensor]:
    """What head k should say at each position: (K, B, T) targets and weights.

    `targets`, `weights` (B, T) are the backbone's: the token after each position. A head that would look beyond the
    row, or with `documents` (B, T) beyond the document, has weight 0 there.
    """
    T = targets.size(1)
    all_targets = targets.new_zeros(num_heads, *targets.shape)
    all_weights = weights.new_zeros(num_heads, *weights.shape)
    for k in range(min(num_heads, T - 1)):
        ahead = k + 1
        all_targets[k, :, : T - ahead] = targets[:, ahead:]
        kept = weights[:, ahead:]
        if documents is not None:
            kept = kept * (documents[:, ahead:] == documents[:, : T - ahead])
        all_weights[k, :, : T - ahead] = kept
    return all_targets, all_weights
