"""nanochat as of July 2026 (commits a825e63 to 92d63d4).

On top of the family of 2025 (`models.nanochat`): most layers see a window; every other layer, the last included,
adds a second embedding of the token to its values; each layer scales the residual stream and mixes the embedding
into it again; a token's embedding takes in a little of the one before it (smear); what the middle layer left is
taken off the final hidden state (backout). The tables of tokens are padded to a multiple of 64 rows.

Ideas: value embeddings from value residual learning (https://arxiv.org/abs/2410.17897), the scalars, smear and
backout from https://github.com/KellerJordan/modded-nanogpt.
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
from nanoworks.nn import functional as NF
from nanoworks.nn.context import Attending, ForwardContext, Window
from nanoworks.nn.head import Head
from nanoworks.nn.linear import Linear, project
from nanoworks.nn.mlp import SquaredReLU
from nanoworks.nn.norm import RMSNorm
from nanoworks.nn.recompute import run_layer
from nanoworks.nn.rope import RoPE

ASPECT_RATIO = 64  # hidden_size per layer, before it is rounded up to whole heads
HEAD_DIM = 128
VOCAB_MULTIPLE = 64
SMEAR_CHANNELS = 24  # features of a token that decide how much of the one before it comes in
VALUE_CHANNELS = 12  # features that decide how much of the value embedding each head takes
QK_SCALE = 1.2  # on normalised queries and keys alike: sharper attention than unit vectors allow


class Nanochat2026Config(ModelConfig):
    model_type: Literal["nanochat_2026"] = "nanochat_2026"
    depth: int | None = Field(default=None, gt=0, exclude=True)
    """The dial: fills hidden_size, layers and heads that are not given."""
    hidden_size: int = Field(ge=SMEAR_CHANNELS)
    rms_norm_eps: float = torch.finfo(torch.float32).eps
    rope_theta: float = 100000.0
    rope_scaling: None = None
    final_logit_softcapping: float = Field(default=15.0, gt=0)
    hidden_act: Literal["relu2"] = "relu2"
    tie_word_embeddings: Literal[False] = False
    window_pattern: str = Field(default="SSSL", pattern="^[SL]+$")
    """S (short) and L (the whole context) for one layer after another, repeated; the last layer is always L."""
    sliding_window: int = Field(gt=0)
    """Keys that a query of a short layer sees, itself included; a quarter of the context, in whole tiles, and one."""

    @model_validator(mode="before")
    @classmethod
    def _turn_the_dial(cls, values: Any) -> Any:
        if isinstance(values, dict):
            values = dict(values)
            depth = values.get("depth")
            if isinstance(depth, int) and depth > 0:
                values.setdefault("num_hidden_layers", depth)
                values.setdefault("hidden_size", math.ceil(depth * ASPECT_RATIO / HEAD_DIM) * HEAD_DIM)
                values.setdefault("num_attention_heads", max(1, values["hidden_size"] // HEAD_DIM))
            if isinstance(values.get("hidden_size"), int):
                values.setdefault("intermediate_size", 4 * values["hidden_size"])
            context = values.setdefault("max_position_embeddings", 2048)
            if isinstance(context, int):
                values.setdefault("sliding_window", short_window(context))
        return values

    @property
    def hf_architecture(self) -> str:
        return "Nanochat2026ForCausalLM"

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embeddings and the head; those from vocab_size on are never used."""
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def window(self, layer: int) -> Window | None:
        """What layer number `layer` sees."""
        last = layer == self.num_hidden_layers - 1
        if last or self.window_pattern[layer % len(self.window_pattern)] == "L":
            return None
        return Window(self.sliding_window)

    def has_value_embedding(self, layer: int) -> bool:
        return (self.num_hidden_layers - 1 - layer) % 2 == 0


def short_window(context: int) -> int:
    """Keys in sight of a short layer: a quarter of the context in tiles of 128, and the query's own."""
    return math.ceil(context / 4 / 128) * 128 + 1


class Nanochat2026Attention(nn.Module):
    """Attention whose values gain `3 * sigmoid(gate) *` value embedding, head by head.

    The norm of queries and keys has no weights, comes after the rotation, and is scaled by QK_SCALE.
    """

    def __init__(self, config: Nanochat2026Config, layer: int, norm: RMSNorm) -> None:
        super().__init__()
        C, D, K = config.hidden_size, config.head_dim, config.num_key_value_heads
        self.layer, self.head_dim, self.window = layer, D, config.window(layer)
        self.norm = norm
        self.q_proj = Linear(C, config.num_attention_heads * D, bias=False)
        self.k_proj = Linear(C, K * D, bias=False)
        self.v_proj = Linear(C, K * D, bias=False)
        self.o_proj = Linear(config.num_attention_heads * D, C, bias=False)
        self.ve_gate = Linear(VALUE_CHANNELS, K, bias=False) if config.has_value_embedding(layer) else None

    def forward(self, x: Tensor, value: Tensor | None, rotation: tuple[Tensor, Tensor], ctx: ForwardContext) -> Tensor:
        """x (..., C); value (..., K * D) where the layer has a gate, else None -> (..., C)."""
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in project(x, self.q_proj, self.k_proj, self.v_proj))
        if self.ve_gate is not None:
            assert value is not None
            gate = 3 * NF.sigmoid(self.ve_gate(x[..., :VALUE_CHANNELS]))
            v = v + gate.unsqueeze(-1) * value.to(v.dtype).unflatten(-1, (-1, self.head_dim))
        q, k = self.norm(NF.apply_rope(q, *rotation)), self.norm(NF.apply_rope(k, *rotation))
        scale = QK_SCALE**2 * self.head_dim**-0.5  # both factors in one place, for nothing
        y = ctx.attend(self.layer, q, k, v, Attending(self.window, scale))
        return self.o_proj(y.flatten(-2))


class Nanochat2026Layer(nn.Module):
    def __init__(self, config: Nanochat2026Config, layer: int, norm: RMSNorm) -> None:
        super().__init__()
        self.norm = norm  # plain, so one object serves every place
        self.self_attn = Nanochat2026Attention(config, layer, norm)
        self.mlp = SquaredReLU(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, value: Tensor | None, rotation: tuple[Tensor, Tensor], ctx: ForwardContext) -> Tensor:
        x = x + self.self_attn(self.norm(x), value, rotation, ctx)
        return x + self.mlp(self.norm(x))


class PaddedHead(Head):
    """A head whose matrix has more rows than there are tokens; no logit leaves it for the rest."""

    def __init__(self, norm: nn.Module, lm_head: Linear, *, vocab_size: int, softcap: float) -> None:
        super().__init__(norm, lm_head, softcap=softcap)
        self.vocab_size = vocab_size

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden)[..., : self.vocab_size]

    def _operands(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = super()._operands(hidden)
        return x, weight[: self.vocab_size]


class Nanochat2026(Decoder):
    config: Nanochat2026Config

    def __init__(self, config: Nanochat2026Config) -> None:
        super().__init__()
        self.config = config
        C, V, L = config.hidden_size, config.padded_vocab_size, config.num_hidden_layers
        norm = RMSNorm(C, eps=config.rms_norm_eps, learned=False)
        self.norm = norm
        self.embed_tokens = embedding(V, C)
        self.smear_gate = Linear(SMEAR_CHANNELS, 1, bias=False)
        self.smear_lambda = nn.Parameter(torch.zeros(1))
        self.rope = RoPE(config.head_dim, theta=config.rope_theta, sign=-1)
        self.value_embeds = nn.ModuleDict(
            {
                str(i): embedding(V, config.num_key_value_heads * config.head_dim)
                for i in range(L)
                if config.has_value_embedding(i)
            }
        )
        self.resid_lambdas = nn.Parameter(torch.ones(L))
        self.x0_lambdas = nn.Parameter(torch.zeros(L))
        self.backout_lambda = nn.Parameter(torch.full((1,), 0.2))
        self.layers = nn.ModuleList(Nanochat2026Layer(config, i, norm) for i in range(L))
        self.head = PaddedHead(
            norm, Linear(C, V, bias=False), vocab_size=config.vocab_size, softcap=config.final_logit_softcapping
        )

    def embed(self, tokens: Tensor, ctx: ForwardContext) -> Tensor:
        """Normed embedding plus a gated part of the one of the token before, wherever there is one."""
        x = self.norm(self.embed_tokens(tokens))
        before = self.norm(self.embed_tokens(ctx.prev_tokens.clamp(min=0)))
        gate = self.smear_lambda * NF.sigmoid(self.smear_gate(x[..., :SMEAR_CHANNELS]))
        return x + gate * (ctx.prev_tokens >= 0).unsqueeze(-1) * before

    def forward(self, tokens: Tensor, ctx: ForwardContext) -> Tensor:
        x = x0 = self.embed(tokens, ctx)
        rotation = self.rope(ctx.positions, ctx.lengths)
        middle = len(self.layers) // 2
        recompute = self.activation_checkpointing if self.training else "none"
        for i, layer in enumerate(self.layers):
            x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            value = self.value_embeds[str(i)](tokens) if str(i) in self.value_embeds else None
            x = run_layer(recompute, layer, x, value, rotation, ctx)
            if i == middle:
                left_behind = x
        return x - self.backout_lambda * left_behind

    def init_weights(self) -> None:
        """nanochat's, in the order of its draws: uniform matrices of standard deviation hidden_size ** -0.5 (0.4
        of it into the MLP), zero projections into the residual stream, a head close to zero, gates just above
        their neutral point, early layers with more of the residual stream and of the embedding."""
        c = self.config
        bound = math.sqrt(3 / c.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=0.8)
        nn.init.normal_(self.head.lm_head.weight, std=0.001)
        attention = [layer.self_attn for layer in self.layers]
        for layer, attn in zip(self.layers, attention, strict=True):
            for leaf in (attn.q_proj, attn.k_proj, attn.v_proj):  # type: ignore[union-attr]
                nn.init.uniform_(leaf.weight, -bound, bound)  # type: ignore[union-attr,arg-type]
            nn.init.zeros_(attn.o_proj.weight)  # type: ignore[union-attr,arg-type]
            nn.init.uniform_(layer.mlp.fc1.weight, -0.4 * bound, 0.4 * bound)  # type: ignore[union-attr,arg-type]
            nn.init.zeros_(layer.mlp.fc2.weight)  # type: ignore[union-attr,arg-type]
        with torch.no_grad():
            for i in range(c.num_hidden_layers):
                share = i / max(c.num_hidden_layers - 1, 1)
                self.resid_lambdas[i] = 1.15 - 0.10 * share
                self.x0_lambdas[i] = 0.20 - 0.15 * share
        nn.init.zeros_(self.smear_lambda)
        nn.init.constant_(self.backout_lambda, 0.2)
        nn.init.uniform_(self.smear_gate.weight, 0.0, 0.02)
        for table in self.value_embeds.values():
            nn.init.uniform_(table.weight, -bound, bound)  # type: ignore[arg-type]
        for attn in attention:
            if attn.ve_gate is not None:  # type: ignore[union-attr]
                nn.init.uniform_(attn.ve_gate.weight, 0.0, 0.02)  # type: ignore[union-attr,arg-type]

    def param_groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """The usual roles, some of them in parts: `embedding.value`, and of `other` residual, skip and smear."""
        groups: dict[str, list[tuple[str, nn.Parameter]]] = {role: [] for role in ("matrix", *_ROLES.values())}
        for name, parameter in self.named_parameters():
            groups[_ROLES.get(name.split(".")[0], "matrix")].append((name, parameter))
        return groups

    def scaling_parameters(self) -> int:
        """Parameters that the length of a run is measured in: those of the layers and the head."""
        return sum(p.numel() for p in self.layers.parameters()) + self.head.lm_head.weight.numel()

    def flops_per_token(self, sequence_length: int) -> int:
        """As the base's, but lookups and scalars cost nothing and a window bounds what attention reads."""
        c = self.config
        dense = self.scaling_parameters() + self.smear_gate.weight.numel()
        attended = 0
        for layer in range(c.num_hidden_layers):
            window = c.window(layer)
            attended += sequence_length if window is None else min(window.size - 1, sequence_length)
        return 6 * dense + 12 * c.num_attention_heads * c.head_dim * attended


_ROLES = {
    "embed_tokens": "embedding",
    "value_embeds": "embedding.value",
    "head": "unembedding",
    "resid_lambdas": "other.residual",
    "x0_lambdas": "other.skip",
    "smear_gate": "other.smear",
    "smear_lambda": "other.smear",
    "backout_lambda": "other.smear",
}


ARCHITECTURES.register("nanochat_2026")(
    Architecture(
        name="nanochat_2026",
        config_cls=Nanochat2026Config,
        model_cls=Nanochat2026,
        keymaps={
            "hf": {
                "head.lm_head.*": "lm_head.*",
                "*": "model.*",
            },
            "nanochat": {
                "embed_tokens.weight": "transformer.wte.weight",
                "layers.*.self_attn.q_proj.weight": "transformer.h.*.attn.c_q.weight",
                "layers.*.self_attn.k_proj.weight": "transformer.h.*.attn.c_k.weight",
                "layers.*.self_attn.v_proj.weight": "transformer.h.*.attn.c_v.weight",
                "layers.*.self_attn.o_proj.weight": "transformer.h.*.attn.c_proj.weight",
                "layers.*.self_attn.ve_gate.weight": "transformer.h.*.attn.ve_gate.weight",
                "layers.*.mlp.fc1.weight": "transformer.h.*.mlp.c_fc.weight",
                "layers.*.mlp.fc2.weight": "transformer.h.*.mlp.c_proj.weight",
                "head.lm_head.weight": "lm_head.weight",
                "value_embeds.*": "value_embeds.*",
                "smear_gate.weight": "smear_gate.weight",
                "smear_lambda": "smear_lambda",
                "resid_lambdas": "resid_lambdas",
                "x0_lambdas": "x0_lambdas",
                "backout_lambda": "backout_lambda",
            },
        },
        tp_plan={
            "layers.*.self_attn.[qkv]_proj": "colwise",
            "layers.*.self_attn.ve_gate": "colwise",
            "layers.*.self_attn.o_proj": "rowwise",
            "layers.*.mlp.fc1": "colwise",
            "layers.*.mlp.fc2": "rowwise",
            "value_embeds.*": "colwise",
        },
    )
)
