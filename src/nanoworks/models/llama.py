"""Llama: pre-norm, grouped-query attention, SwiGLU, learned RMSNorm (https://arxiv.org/abs/2302.13971).

The families that follow it derive from the classes here and state only what is different: a layer makes its
attention and its feed-forward block in a method of its own each.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import nn

from nanoworks.config.model import ModelConfig
from nanoworks.models.decoder import Decoder, embedding
from nanoworks.models.registry import ARCHITECTURES, Architecture
from nanoworks.nn.attention import Attention
from nanoworks.nn.head import Head
from nanoworks.nn.layer import PreNormLayer
from nanoworks.nn.linear import GroupedLinear, Linear
from nanoworks.nn.mlp import SwiGLU
from nanoworks.nn.norm import RMSNorm
from nanoworks.nn.rope import RoPE


class LlamaLikeConfig(ModelConfig):
    """What Llama and the families after it share."""

    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    hidden_act: Literal["silu"] = "silu"
    initializer_range: float = 0.02


class LlamaConfig(LlamaLikeConfig):
    model_type: Literal["llama"] = "llama"
    attention_bias: bool = False
    mlp_bias: bool = False

    @property
    def hf_architecture(self) -> str:
        return "LlamaForCausalLM"


class LlamaLayer(PreNormLayer):
    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = self.attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = self.feed_forward(config, layer)

    def attention(self, config: Any, layer: int) -> Attention:
        bias = config.attention_bias
        return Attention(layer, **attention_sizes(config), bias=bias, output_bias=bias)

    def feed_forward(self, config: Any, layer: int) -> nn.Module:
        return SwiGLU(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)


def attention_sizes(config: ModelConfig) -> dict[str, Any]:
    """The keywords of `Attention` that say how large it is."""
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    return {name: getattr(config, name) for name in names}


class Llama(Decoder):
    layer_cls: ClassVar[type[nn.Module]] = LlamaLayer

    def __init__(self, config: LlamaLikeConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size)
        self.rope = RoPE(
            config.head_dim,
            theta=config.rope_theta,
            scaling=None if config.rope_scaling is None else config.rope_scaling.model_dump(),
            max_position_embeddings=config.max_position_embeddings,
        )
        self.layers = nn.ModuleList(self.layer_cls(config, i) for i in range(config.num_hidden_layers))
        lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.head = Head(RMSNorm(config.hidden_size, eps=config.rms_norm_eps), lm_head)
        self.tie_weights()

    def init_weights(self) -> None:
        """Normal with `initializer_range`; projections into the residual stream scaled by 1 / sqrt(2 layers)."""
        std = self.config.initializer_range  # type: ignore[attr-defined]
        residual_std = std / (2 * self.config.num_hidden_layers) ** 0.5
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                into_residual = name.endswith(("o_proj", "down_proj"))
                nn.init.normal_(module.weight, std=residual_std if into_residual else std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, GroupedLinear):
                nn.init.normal_(module.weight, std=residual_std if name.endswith("down_proj") else std)
            elif isinstance(module, RMSNorm) and module.weight is not None:
                nn.init.ones_(module.weight)


HF_KEYS = {
    "embed_tokens.*": "model.embed_tokens.*",
    "layers.*": "model.layers.*",
    "head.norm.*": "model.norm.*",
    "head.lm_head.*": "lm_head.*",
}
TP_PLAN = {
    "layers.*.self_attn.[qkv]_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}

ARCHITECTURES.register("llama")(
    Architecture(name="llama", config_cls=LlamaConfig, model_cls=Llama, keymaps={"hf": HF_KEYS}, tp_plan=TP_PLAN)
)
