"""The layer most decoders share: attention and a feed-forward block, each behind its norm and added to its input."""

from __future__ import annotations

from torch import Tensor, nn

from nanoworks.nn.context import ForwardContext


class PreNormLayer(nn.Module):
    """`x + attention(norm(x))`, then `x + feed_forward(norm(x))` (https://arxiv.org/abs/2002.04745).

    A family's constructor sets the four modules under the names its checkpoints use and says here which they are. One
    that does not override `forward` runs, with all its like, as a single operator where there are kernels for it.
    """

    attention_norm = "input_layernorm"
    attention_block = "self_attn"
    feed_forward_norm = "post_attention_layernorm"
    feed_forward_block = "mlp"

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], ctx: ForwardContext) -> Tensor:
        x = x + getattr(self, self.attention_block)(getattr(self, self.attention_norm)(x), rotation, ctx)
        return x + getattr(self, self.feed_forward_block)(getattr(self, self.feed_forward_norm)(x))
