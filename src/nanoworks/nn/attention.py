"""Grouped-query attention; where keys and values live is the context's business.

Shapes: H query heads, K key/value heads, D features a head; `...` is (B, T) in training and (N,) packed
tokens in the engine. No head count appears in forward, so a tensor-parallel shard runs the same lines.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nanoworks.nn import functional as NF
from nanoworks.nn.context import Attending, ForwardContext, Window
from nanoworks.nn.linear import Linear, project


class Attention(nn.Module):
    """Grouped-query attention.

    Args:
        layer: index of the layer, under which the context keeps keys and values.
        hidden_size, num_attention_heads, num_key_value_heads, head_dim: as in the config.
        bias: of the projections of q, k and v. output_bias: of the one out of the heads.
        q_norm, k_norm: normalise each head of q and k, before the rotation or after it (`norm_after_rope`).
        rotate: False leaves positions out of this layer.
        window, scale, softcap: as in `ForwardContext.attend`.
        sinks: learn a logit a head that takes its share of the softmax and gives nothing.
    """

    def __init__(
        self,
        layer: int,
        *,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        bias: bool = False,
        output_bias: bool = False,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        norm_after_rope: bool = False,
        rotate: bool = True,
        window: Window | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: bool = False,
    ) -> None:
        super().__init__()
        self.layer, self.head_dim, self.rotate, self.norm_after_rope = layer, head_dim, rotate, norm_after_rope
        self.window, self.scale, self.softcap = window, scale, softcap
        self.q_proj = Linear(hidden_size, num_attention_heads * head_dim, bias=bias)
        self.k_proj = Linear(hidden_size, num_key_value_heads * head_dim, bias=bias)
        self.v_proj = Linear(hidden_size, num_key_value_heads * head_dim, bias=bias)
        self.o_proj = Linear(num_attention_heads * head_dim, hidden_size, bias=output_bias)
        self.q_norm, self.k_norm = q_norm, k_norm
        self.sinks = nn.Parameter(torch.zeros(num_attention_heads)) if sinks else None

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], ctx: ForwardContext) -> Tensor:
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in project(x, self.q_proj, self.k_proj, self.v_proj))
        if not self.norm_after_rope:
            q, k = self._norm(q, k)
        if self.rotate:
            q, k = NF.apply_rope(q, *rotation), NF.apply_rope(k, *rotation)
        if self.norm_after_rope:
            q, k = self._norm(q, k)
        y = ctx.attend(self.layer, q, k, v, Attending(self.window, self.scale, self.softcap, self.sinks))
        return self.o_proj(y.flatten(-2))

    def _norm(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q if self.q_norm is None else self.q_norm(q), k if self.k_norm is None else self.k_norm(k)
