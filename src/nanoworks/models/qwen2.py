"""Qwen2: Llama with biases on q, k and v, and windows on the upper layers (https://arxiv.org/abs/2407.10671)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from nanoworks.models.llama import HF_KEYS, TP_PLAN, Llama, attention_sizes
from nanoworks.models.mistral import MistralLayer, WindowConfig
from nanoworks.models.registry import ARCHITECTURES, Architecture
from nanoworks.nn.attention import Attention
from nanoworks.nn.context import Window


class QwenConfig(WindowConfig):
    """What the Qwen families share."""

    use_sliding_window: bool = False
    max_window_layers: int = Field(default=28, ge=0)
    """Layers below this one see everything."""

    def window(self, layer: int) -> Window | None:
        below = self.layer_types is None and layer < self.max_window_layers
        return None if below or not self.use_sliding_window else super().window(layer)


class Qwen2Config(QwenConfig):
    model_type: Literal["qwen2"] = "qwen2"

    @property
    def hf_architecture(self) -> str:
        return "Qwen2ForCausalLM"


class Qwen2Layer(MistralLayer):
    def attention(self, config: Any, layer: int) -> Attention:
        return Attention(layer, **attention_sizes(config), bias=True, window=config.window(layer))


class Qwen2(Llama):
    layer_cls: ClassVar[type[nn.Module]] = Qwen2Layer


ARCHITECTURES.register("qwen2")(
    Architecture(name="qwen2", config_cls=Qwen2Config, model_cls=Qwen2, keymaps={"hf": HF_KEYS}, tp_plan=TP_PLAN)
)
