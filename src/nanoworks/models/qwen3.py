"""Qwen3: heads of q and k are normalised before the rotation (https://arxiv.org/abs/2505.09388)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import nn

from nanoworks.models.llama import HF_KEYS, TP_PLAN, Llama, attention_sizes
from nanoworks.models.mistral import MistralLayer
from nanoworks.models.qwen2 import QwenConfig
from nanoworks.models.registry import ARCHITECTURES, Architecture
from nanoworks.nn.attention import Attention
from nanoworks.nn.norm import RMSNorm


class Qwen3Config(QwenConfig):
    model_type: Literal["qwen3"] = "qwen3"
    head_dim: int = 128
    attention_bias: bool = False

    @property
    def hf_architecture(self) -> str:
        return "Qwen3ForCausalLM"


class Qwen3Layer(MistralLayer):
    def attention(self, config: Any, layer: int) -> Attention:
        return Attention(
            layer,
            **attention_sizes(config),
            bias=config.attention_bias,
            output_bias=config.attention_bias,
            q_norm=RMSNorm(config.head_dim, eps=config.rms_norm_eps),
            k_norm=RMSNorm(config.head_dim, eps=config.rms_norm_eps),
            window=config.window(layer),
        )


class Qwen3(Llama):
    layer_cls: ClassVar[type[nn.Module]] = Qwen3Layer


ARCHITECTURES.register("qwen3")(
    Architecture(name="qwen3", config_cls=Qwen3Config, model_cls=Qwen3, keymaps={"hf": HF_KEYS}, tp_plan=TP_PLAN)
)
