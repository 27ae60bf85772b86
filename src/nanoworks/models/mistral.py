"""Mistral: Llama with attention to the newest tokens only (https://arxiv.org/abs/2310.06825).

Beyond the original, some tokens may stay in sight of all: the first ones of a sequence, which hold attention
steady in a stream without end (https://arxiv.org/abs/2309.17453), and those of given ids.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import nn

from nanoworks.models.llama import HF_KEYS, TP_PLAN, Llama, LlamaLayer, LlamaLikeConfig, attention_sizes
from nanoworks.models.registry import ARCHITECTURES, Architecture
from nanoworks.nn.attention import Attention
from nanoworks.nn.context import Window
from nanoworks.nn.mlp import SwiGLU


class WindowConfig(LlamaLikeConfig):
    """A family whose layers may see the newest tokens only."""

    sliding_window: int | None = Field(default=None, gt=0)
    """Keys that a query sees, itself included; None is all."""
    layer_types: list[Literal["sliding_attention", "full_attention"]] | None = None
    """Which layers have the window; None is every one."""
    num_global_tokens: int = Field(default=0, ge=0)
    """First tokens of a sequence that no window hides."""
    global_token_ids: list[int] = Field(default_factory=list)
    """Ids of tokens that no window hides."""

    @model_validator(mode="after")
    def _one_type_a_layer(self) -> WindowConfig:
        given, layers = self.layer_types, self.num_hidden_layers
        if given is not None and len(given) != layers:
            raise ValueError(f"layer_types has {len(given)} entries for {layers} layers; give one a layer")
        return self

    def window(self, layer: int) -> Window | None:
        """What layer number `layer` sees."""
        kind = self.layer_types[layer] if self.layer_types is not None else "sliding_attention"
        if self.sliding_window is None or kind == "full_attention":
            return None
        return Window(self.sliding_window, first=self.num_global_tokens, token_ids=tuple(self.global_token_ids))


class MistralConfig(WindowConfig):
    model_type: Literal["mistral"] = "mistral"

    @property
    def hf_architecture(self) -> str:
        return "MistralForCausalLM"


class MistralLayer(LlamaLayer):
    def attention(self, config: Any, layer: int) -> Attention:
        return Attention(layer, **attention_sizes(config), window=config.window(layer))

    def feed_forward(self, config: Any, layer: int) -> nn.Module:
        return SwiGLU(config.hidden_size, config.intermediate_size)


class Mistral(Llama):
    layer_cls: ClassVar[type[nn.Module]] = MistralLayer


ARCHITECTURES.register("mistral")(
    Architecture(name="mistral", config_cls=MistralConfig, model_cls=Mistral, keymaps={"hf": HF_KEYS}, tp_plan=TP_PLAN)
)
