"""Grouped-query attention; where keys and values live is the context's business.

Shapes: H query heads, K key/value heads, D features a head; `...` is (B, T) in training and (N,) packed
tokens in the engine. No head count appears in forward, so a tensor-parallel shard runs the same lines.
"""

from __future__ import annotations

from torch import Tensor, nn

from nanoworks.nn import functional as NF
from nanoworks.nn.context import ForwardContext
from nanoworks.nn.linear import Linear, project


class Attention(nn.Module):
    """Args: `qk_norm`, if given, normalises the heads of q and k after the rotation; `window` as in `attend`."""

    def __init__(
        self,
        layer: int,
        *,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        bias: bool = False,
        qk_norm: nn.Module | None = None,
        window: int | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.layer, self.head_dim, self.window, self.scale = layer, head_dim, window, scale
        self.q_proj = Linear(hidden_size, num_attention_heads * head_dim, bias=bias)
        self.k_proj = Linear(hidden_size, num_key_value_heads * head_dim, bias=bias)
        self.v_proj = Linear(hidden_size, num_key_value_heads * head_dim, bias=bias)
        self.o_proj = Linear(num_attention_heads * head_dim, hidden_size, bias=bias)
        self.qk_norm = qk_norm

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], ctx: ForwardContext) -> Tensor:
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in project(x, self.q_proj, self.k_proj, self.v_proj))
        q, k = NF.apply_rope(q, *rotation), NF.apply_rope(k, *rotation)
        if self.qk_norm is not None:
            q, k = self.qk_norm(q), self.qk_norm(k)
        y = ctx.attend(self.layer, q, k, v, window=self.window, scale=self.scale)
        return self.o_proj(y.flatten(-2))
