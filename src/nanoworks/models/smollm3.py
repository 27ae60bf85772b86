"""SmolLM3: Llama in which every fourth layer is blind to positions (https://arxiv.org/abs/2501.18795)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import nn

from nanoworks.models.llama import HF_KEYS, TP_PLAN, Llama, LlamaLayer, attention_sizes
from nanoworks.models.mistral import WindowConfig
from nanoworks.models.registry import ARCHITECTURES, Architecture
from nanoworks.nn.attention import Attention
from nanoworks.nn.context import Window


class SmolLM3Config(WindowConfig):
    model_type: Literal["smollm3"] = "smollm3"
    rope_theta: float = 2e6
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    no_rope_layer_interval: int = Field(default=4, gt=0)
    """Every so-manieth layer does not rotate q and k."""
    no_rope_layers: list[Literal[0, 1]] | None = None
    """For each layer 1 where it rotates and 0 where it does not, in place of the interval."""
    use_sliding_window: bool = False

    @model_validator(mode="after")
    def _one_entry_a_layer(self) -> SmolLM3Config:
        given, needed = self.no_rope_layers, self.num_hidden_layers
        if given is not None and len(given) < needed:
            raise ValueError(f"no_rope_layers has {len(given)} entries for {needed} layers; give one a layer")
        return self

    def rotates(self, layer: int) -> bool:
        """Whether layer number `layer` sees positions."""
        if self.no_rope_layers is not None:
            return self.no_rope_layers[layer] == 1
        return (layer + 1) % self.no_rope_layer_interval != 0

    def window(self, layer: int) -> Window | None:
        everything = self.layer_types is None and self.rotates(layer)
        return None if everything or not self.use_sliding_window else super().window(layer)

    @property
    def hf_architecture(self) -> str:
        return "SmolLM3ForCausalLM"


class SmolLM3Layer(LlamaLayer):
    def attention(self, config: Any, layer: int) -> Attention:
        return Attention(
            layer,
            **attention_sizes(config),
            bias=config.attention_bias,
            output_bias=config.attention_bias,
            rotate=config.rotates(layer),
            window=config.window(layer),
        )


class SmolLM3(Llama):
    layer_cls: ClassVar[type[nn.Module]] = SmolLM3Layer


ARCHITECTURES.register("smollm3")(
    Architecture(name="smollm3", config_cls=SmolLM3Config, model_cls=SmolLM3, keymaps={"hf": HF_KEYS}, tp_plan=TP_PLAN)
)
