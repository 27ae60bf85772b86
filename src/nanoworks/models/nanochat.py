"""nanochat as of November 2025 (commit 885a4f2): norm after the embedding, rotation by -theta from a bfloat16
table, QK norm after the rotation, squared ReLU, plain norms, logits soft-capped at 15, untied head.

`depth` is nanochat's single dial: it sets width and heads (64 features of width a layer, heads of 128).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from nanoworks.config.model import ModelConfig
from nanoworks.models.decoder import Decoder, embedding
from nanoworks.models.registry import ARCHITECTURES, Architecture
from nanoworks.nn.attention import Attention
from nanoworks.nn.context import ForwardContext
from nanoworks.nn.head import Head
from nanoworks.nn.layer import PreNormLayer
from nanoworks.nn.linear import Linear
from nanoworks.nn.mlp import SquaredReLU
from nanoworks.nn.norm import RMSNorm
from nanoworks.nn.rope import RoPE

ASPECT_RATIO = 64  # hidden_size per layer
HEAD_DIM = 128


class NanochatConfig(ModelConfig):
    model_type: Literal["nanochat"] = "nanochat"
    depth: int | None = Field(default=None, gt=0, exclude=True)
    """The dial: fills hidden_size, layers and heads that are not given."""
    rms_norm_eps: float = torch.finfo(torch.float32).eps
    rope_theta: float = 10000.0
    rope_scaling: None = None
    final_logit_softcapping: float = Field(default=15.0, gt=0)
    hidden_act: Literal["relu2"] = "relu2"
    tie_word_embeddings: Literal[False] = False

    @model_validator(mode="before")
    @classmethod
    def _turn_the_dial(cls, values: Any) -> Any:
        if isinstance(values, dict):
            values = dict(values)
            depth = values.get("depth")
            if isinstance(depth, int) and depth > 0:
                values.setdefault("num_hidden_layers", depth)
                values.setdefault("hidden_size", depth * ASPECT_RATIO)
                heads = max(1, (values["hidden_size"] + HEAD_DIM - 1) // HEAD_DIM)
                values.setdefault("num_attention_heads", heads)
            if isinstance(values.get("hidden_size"), int):
                values.setdefault("intermediate_size", 4 * values["hidden_size"])
            values.setdefault("max_position_embeddings", 2048)
        return values

    @property
    def hf_architecture(self) -> str:
        return "NanoChatForCausalLM"


class NanochatLayer(PreNormLayer):
    attention_norm = feed_forward_norm = "norm"

    def __init__(self, config: NanochatConfig, layer: int, norm: RMSNorm) -> None:
        super().__init__()
        self.norm = norm  # plain, so one object serves every place
        self.self_attn = Attention(
            layer,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            q_norm=norm,
            k_norm=norm,
            norm_after_rope=True,
        )
        self.mlp = SquaredReLU(config.hidden_size, config.intermediate_size)


class Nanochat(Decoder):
    def __init__(self, config: NanochatConfig) -> None:
        super().__init__()
        self.config = config
        norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, learned=False)
        self.norm = norm
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size)
        self.rope = RoPE(config.head_dim, theta=config.rope_theta, sign=-1, table_dtype=torch.bfloat16)
        self.layers = nn.ModuleList(NanochatLayer(config, i, norm) for i in range(config.num_hidden_layers))
        self.head = Head(
            norm,
            Linear(config.hidden_size, config.vocab_size, bias=False),
            softcap=config.final_logit_softcapping,
        )

    def embed(self, tokens: Tensor, ctx: ForwardContext) -> Tensor:
        return self.norm(self.embed_tokens(tokens))

    def init_weights(self) -> None:
        """Matrices as in https://arxiv.org/abs/2310.17813, embedding N(0, 1); the head and all projections into
        the residual stream start at zero. Draws in module order, as nanochat does."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                fan_out, fan_in = module.weight.shape
                nn.init.normal_(module.weight, std=min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in))
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight)
        nn.init.zeros_(self.head.lm_head.weight)
        for layer in self.layers:
            nn.init.zeros_(layer.self_attn.o_proj.weight)  # type: ignore[union-attr,arg-type]
            nn.init.zeros_(layer.mlp.fc2.weight)  # type: ignore[union-attr,arg-type]


ARCHITECTURES.register("nanochat")(
    Architecture(
        name="nanochat",
        config_cls=NanochatConfig,
        model_cls=Nanochat,
        keymaps={
            "hf": {
                "embed_tokens.*": "model.embed_tokens.*",
                "layers.*": "model.layers.*",
                "head.lm_head.*": "lm_head.*",
            },
            "nanochat": {
                "embed_tokens.weight": "transformer.wte.weight",
                "layers.*.self_attn.q_proj.weight": "transformer.h.*.attn.c_q.weight",
                "layers.*.self_attn.k_proj.weight": "transformer.h.*.attn.c_k.weight",
                "layers.*.self_attn.v_proj.weight": "transformer.h.*.attn.c_v.weight",
                "layers.*.self_attn.o_proj.weight": "transformer.h.*.attn.c_proj.weight",
                "layers.*.mlp.fc1.weight": "transformer.h.*.mlp.c_fc.weight",
                "layers.*.mlp.fc2.weight": "transformer.h.*.mlp.c_proj.weight",
                "head.lm_head.weight": "lm_head.weight",
            },
        },
        tp_plan={
            "layers.*.self_attn.[qkv]_proj": "colwise",
            "layers.*.self_attn.o_proj": "rowwise",
            "layers.*.mlp.fc1": "colwise",
            "layers.*.mlp.fc2": "rowwise",
        },
    )
)
