"""Qwen3-MoE: Qwen3 with mixtures of many small experts in some layers or all (https://arxiv.org/abs/2505.09388)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from nanoworks.models.llama import HF_KEYS, TP_PLAN, Llama
from nanoworks.models.mistral import WindowConfig
from nanoworks.models.mixtral import EXPERTS_TP_PLAN
from nanoworks.models.qwen2 import QwenConfig
from nanoworks.models.qwen3 import Qwen3Layer
from nanoworks.models.registry import ARCHITECTURES, Architecture
from nanoworks.nn.context import ForwardContext, Window
from nanoworks.nn.mlp import SwiGLU
from nanoworks.nn.moe import MoE


class Qwen3MoeConfig(QwenConfig):
    other_spellings: ClassVar[Mapping[str, str]] = {"num_experts": "num_local_experts"}  # of transformers 5

    model_type: Literal["qwen3_moe"] = "qwen3_moe"
    attention_bias: bool = False
    num_experts: int = Field(default=128, gt=0)
    num_experts_per_tok: int = Field(default=8, gt=0)
    moe_intermediate_size: int = Field(default=768, gt=0)
    """Features inside one expert; `intermediate_size` is that of a dense layer."""
    norm_topk_prob: bool = False
    decoder_sparse_step: int = Field(default=1, gt=0)
    """Every so-manieth layer has experts."""
    mlp_only_layers: list[int] = Field(default_factory=list)
    """Layers that are dense in any case."""
    router_aux_loss_coef: float = Field(default=0.001, ge=0)
    router_selection_bias: bool = False
    """Experts are chosen with a bias each, which transformers' model of this family does not know; training with
    `moe.bias_update_rate` makes it."""

    @model_validator(mode="after")
    def _enough_experts(self) -> Qwen3MoeConfig:
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(f"num_experts_per_tok {self.num_experts_per_tok} exceeds num_experts {self.num_experts}")
        return self

    def window(self, layer: int) -> Window | None:
        """In every layer: unlike the dense family's, transformers' model of this one knows no `max_window_layers`."""
        return WindowConfig.window(self, layer) if self.use_sliding_window else None

    def sparse(self, layer: int) -> bool:
        """Whether layer number `layer` has experts."""
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0

    @property
    def hf_architecture(self) -> str:
        return "Qwen3MoeForCausalLM"


class Qwen3MoeLayer(Qwen3Layer):
    def feed_forward(self, config: Any, layer: int) -> nn.Module:
        self.sparse = config.sparse(layer)
        if not self.sparse:
            return SwiGLU(config.hidden_size, config.intermediate_size)
        return MoE(
            layer,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            num_experts=config.num_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            normalize=config.norm_topk_prob,
            selection_bias=config.router_selection_bias,
        )

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], ctx: ForwardContext) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation, ctx)
        h = self.post_attention_layernorm(x)
        return x + (self.mlp(h, ctx) if self.sparse else self.mlp(h))


class Qwen3Moe(Llama):
    layer_cls: ClassVar[type[nn.Module]] = Qwen3MoeLayer


_EXPERTS = "layers.*.mlp.experts"

ARCHITECTURES.register("qwen3_moe")(
    Architecture(
        name="qwen3_moe",
        config_cls=Qwen3MoeConfig,
        model_cls=Qwen3Moe,
        keymaps={
            "hf": {
                "layers.*.mlp.e_score_correction_bias": "model.layers.*.mlp.gate.e_score_correction_bias",
                **{
                    f"{_EXPERTS}.{leaf}.weight": f"model.{_EXPERTS}.#.{leaf}.weight"
                    for leaf in ("gate_proj", "up_proj", "down_proj")
                },
                **HF_KEYS,
            }
        },
        tp_plan={**TP_PLAN, **EXPERTS_TP_PLAN},
    )
)
