"""Mixtral: Mistral with a mixture of experts in place of the feed-forward block (https://arxiv.org/abs/2401.04088)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from nanoworks.models.llama import HF_KEYS, TP_PLAN, Llama
from nanoworks.models.mistral import MistralLayer, WindowConfig
from nanoworks.models.registry import ARCHITECTURES, Architecture
from nanoworks.nn.context import ForwardContext
from nanoworks.nn.moe import MoE


class MixtralConfig(WindowConfig):
    model_type: Literal["mixtral"] = "mixtral"
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6
    num_local_experts: int = Field(default=8, gt=0)
    num_experts_per_tok: int = Field(default=2, gt=0)
    router_aux_loss_coef: float = Field(default=0.001, ge=0)
    router_selection_bias: bool = False
    """Experts are chosen with a bias each, which transformers' model of this family does not know; training with
    `moe.bias_update_rate` makes it."""

    @model_validator(mode="after")
    def _enough_experts(self) -> MixtralConfig:
        if self.num_experts_per_tok > self.num_local_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} exceeds num_local_experts {self.num_local_experts}"
            )
        return self

    @property
    def hf_architecture(self) -> str:
        return "MixtralForCausalLM"


class MixtralLayer(MistralLayer):
    def feed_forward(self, config: Any, layer: int) -> nn.Module:
        return MoE(
            layer,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_experts=config.num_local_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            selection_bias=config.router_selection_bias,
        )

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], ctx: ForwardContext) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation, ctx)
        return x + self.mlp(self.post_attention_layernorm(x), ctx)


class Mixtral(Llama):
    layer_cls: ClassVar[type[nn.Module]] = MixtralLayer


EXPERTS_TP_PLAN = {
    "layers.*.mlp.experts.gate_proj": "colwise",
    "layers.*.mlp.experts.up_proj": "colwise",
    "layers.*.mlp.experts.down_proj": "rowwise",
}
_MOE, _THEIRS = "layers.*.mlp", "model.layers.*.block_sparse_moe"

ARCHITECTURES.register("mixtral")(
    Architecture(
        name="mixtral",
        config_cls=MixtralConfig,
        model_cls=Mixtral,
        keymaps={
            "hf": {
                f"{_MOE}.e_score_correction_bias": f"{_THEIRS}.gate.e_score_correction_bias",
                f"{_MOE}.gate.weight": f"{_THEIRS}.gate.weight",
                f"{_MOE}.experts.gate_proj.weight": f"{_THEIRS}.experts.#.w1.weight",
                f"{_MOE}.experts.up_proj.weight": f"{_THEIRS}.experts.#.w3.weight",
                f"{_MOE}.experts.down_proj.weight": f"{_THEIRS}.experts.#.w2.weight",
                **HF_KEYS,
            }
        },
        tp_plan={**{k: v for k, v in TP_PLAN.items() if ".mlp." not in k}, **EXPERTS_TP_PLAN},
    )
)
