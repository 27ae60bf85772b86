"""`plain`: the straightforward PyTorch implementation of nanochat's training step, the yardstick of `train.py`.

The same architecture and the same arithmetic as `nanoworks.models.nanochat` written the obvious way: library
functions only, full logits, one matrix at a time in Muon, bfloat16 by autocast. Nothing here is slowed down,
and nothing of nanoworks is imported.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SOFTCAP = 15.0


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, H, D); cos and sin (1, T, 1, D/2)."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1).to(x.dtype)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        n = norm(x)
        q, k, v = (leaf(n).unflatten(-1, (self.heads, -1)) for leaf in (self.q, self.k, self.v))
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
        q, k, v = (t.to(v.dtype).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(norm(x))).square())


class PlainModel(nn.Module):
    def __init__(self, *, depth: int, dim: int, heads: int, vocab_size: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.head = nn.Linear(dim, vocab_size, bias=False)
        half = dim // heads // 2
        frequency = 10000.0 ** (-torch.arange(half) / half)
        angle = torch.arange(length)[:, None] * frequency
        self.register_buffer("cos", angle.cos().bfloat16()[None, :, None])
        self.register_buffer("sin", angle.sin().bfloat16()[None, :, None])

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = norm(self.embedding(tokens))
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.head(norm(x)).float()
        logits = SOFTCAP * torch.tanh(logits / SOFTCAP)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def orthogonalise(g: Tensor) -> Tensor:
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    if g.size(0) > g.size(1):
        x = x.mT
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if g.size(0) > g.size(1) else x


class PlainOptimizer:
    """AdamW on embedding and head, Muon on the rest."""

    def __init__(self, model: PlainModel) -> None:
        self.adamw = torch.optim.AdamW(
            [{"params": model.head.parameters(), "lr": 0.004}, {"params": model.embedding.parameters(), "lr": 0.2}],
            betas=(0.8, 0.95),
            eps=1e-10,
            weight_decay=0.0,
            fused=True,
        )
        self.matrices = list(model.blocks.parameters())
        self.momentum = [torch.zeros_like(p) for p in self.matrices]

    @torch.no_grad()
    def step(self) -> None:
        self.adamw.step()
        for p, buffer in zip(self.matrices, self.momentum, strict=True):
            buffer.lerp_(p.grad, 0.05)
            update = orthogonalise(p.grad.lerp_(buffer, 0.95))
            p.add_(update, alpha=-0.02 * max(1, p.size(0) / p.size(1)) ** 0.5)


def plain_step(
    tokens: Tensor, targets: Tensor, *, depth: int, dim: int, heads: int, vocab_size: int, dtype: torch.dtype
) -> Callable[[], float]:
    """Return a function that takes one training step on the batch (B, T) and returns its loss."""
    model = PlainModel(depth=depth, dim=dim, heads=heads, vocab_size=vocab_size, length=tokens.size(1))
    optimizer = PlainOptimizer(model)

    def step() -> float:
        autocast = torch.autocast("cpu", dtype) if dtype != torch.float32 else contextlib.nullcontext()
        with autocast:
            loss = model(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad(set_to_none=True)
        return loss.item()

    return step
