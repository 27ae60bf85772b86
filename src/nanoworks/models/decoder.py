"""The frame that every family fills: embedding, layers, head.

A family's constructor sets `embed_tokens`, `rope`, `layers` and `head`; it overrides `embed` only when its
embedding does more than a lookup.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nanoworks.config.model import ModelConfig
from nanoworks.config.recipe import Checkpointing
from nanoworks.nn.context import ForwardContext
from nanoworks.nn.head import Head
from nanoworks.nn.moe import MoE
from nanoworks.nn.recompute import run_layer
from nanoworks.nn.rope import RoPE


def embedding(vocab_size: int, hidden_size: int) -> nn.Embedding:
    """An embedding, N(0, 1). On the meta device random numbers mean nothing, and drawing them imports torch's compiler
    or sympy, which takes seconds."""
    weight = torch.empty(vocab_size, hidden_size)
    return nn.Embedding(vocab_size, hidden_size, _weight=weight if weight.is_meta else weight.normal_())


class Decoder(nn.Module):
    config: ModelConfig
    embed_tokens: nn.Embedding
    rope: RoPE
    layers: nn.ModuleList
    head: Head
    activation_checkpointing: Checkpointing = "none"
    """What of each layer is computed again in backward instead of kept (`nn.recompute`)."""

    def embed(self, tokens: Tensor, ctx: ForwardContext) -> Tensor:
        return self.embed_tokens(tokens)

    def forward(self, tokens: Tensor, ctx: ForwardContext) -> Tensor:
        """tokens (B, T) or (N,) -> hidden states before the final norm, (..., hidden_size)."""
        x = self.embed(tokens, ctx)
        rotation = self.rope(ctx.positions, ctx.lengths)
        recompute = self.activation_checkpointing if self.training else "none"
        for layer in self.layers:
            x = run_layer(recompute, layer, x, rotation, ctx)
        return x

    def init_weights(self) -> None:
        """Initialise every parameter from torch's global generator."""
        raise NotImplementedError

    def param_groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Parameters by the role that optimizers tell apart: matrix, embedding, unembedding, other (vectors);
        with experts also matrix.experts (stacks of matrices) and other.router. What has no gradient has no role."""
        mixtures = [name for name, module in self.named_modules() if isinstance(module, MoE)]
        parts = {f"{name}.gate.": "other.router" for name in mixtures}
        parts |= {f"{name}.experts.": "matrix.experts" for name in mixtures}
        groups: dict[str, list[tuple[str, nn.Parameter]]] = {
            "matrix": [],
            "embedding": [],
            "unembedding": [],
            "other": [],
        }
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            if name.startswith("embed_tokens."):
                groups["embedding"].append((name, parameter))
            elif name.startswith("head.lm_head."):
                groups["unembedding"].append((name, parameter))
            elif part := next((role for prefix, role in parts.items() if name.startswith(prefix)), None):
                groups.setdefault(part, []).append((name, parameter))
            else:
                groups["matrix" if parameter.ndim == 2 else "other"].append((name, parameter))
        return groups

    def tie_weights(self) -> None:
        """Make the head's matrix the embedding's again, after either was replaced."""
        if self.config.tie_word_embeddings:
            self.head.lm_head.weight = self.embed_tokens.weight

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def num_active_parameters(self) -> int:
        """Parameters that work on one token: of E experts of which it goes to k, k / E."""
        idle = 0
        for module in self.modules():
            if isinstance(module, MoE):
                experts = sum(p.numel() for p in module.experts.parameters())
                idle += experts * (module.num_experts - module.top_k) // module.num_experts
        return self.num_parameters() - idle

    def flops_per_token(self, sequence_length: int) -> int:
        """Training FLOPs a token, forward and backward, attention over the full row, of experts those that work (PaLM,
        appendix B, https://arxiv.org/abs/2204.02311)."""
        c = self.config
        dense = self.num_active_parameters() - (0 if c.tie_word_embeddings else self.embed_tokens.weight.numel())
        return 6 * dense + 12 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * sequence_length
