"""GGUF, the file that llama.cpp loads, for the families it computes as we do.

Names and metadata are those that llama.cpp looks for (https://github.com/ggml-org/ggml, docs/gguf.md). What it would
compute otherwise (a window, some kinds of scaled RoPE) is refused, or the context is cut to where nothing differs.
Needs the package gguf.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanoworks.checkpoint.gguf.tokenizer import GgufTokenizer
from nanoworks.checkpoint.weights import WeightFiles
from nanoworks.common.errors import UserError, missing_extra
from nanoworks.config.model import ModelConfig
from nanoworks.models import Decoder
from nanoworks.nn.rope import RoPE

FILE = "model.gguf"

# Our family -> llama.cpp's architecture.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
}

_TOP = {"embed_tokens": "token_embd", "head.norm": "output_norm", "head.lm_head": "output"}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}


def check_gguf(config: ModelConfig) -> None:
    """UserError when llama.cpp cannot compute this model as we do, or gguf is not installed."""
    _import_gguf()
    c: Any = config
    if c.model_type not in ARCHITECTURES:
        raise UserError(f"GGUF is written for {', '.join(ARCHITECTURES)}; this is a {c.model_type}")
    kind = c.rope_scaling.rope_type if c.rope_scaling is not None else "default"
    if kind not in ("default", "linear", "dynamic", "llama3", "yarn"):
        raise UserError(f"rope_type {kind} is not written to GGUF: llama.cpp chooses its factors by other rules")
    if c.model_type == "qwen3_moe":
        if not c.norm_topk_prob:
            raise UserError(
                "norm_topk_prob is false, and llama.cpp's qwen3moe always normalises; no GGUF of this model"
            )
        if not all(c.sparse(i) for i in range(c.num_hidden_layers)):
            raise UserError("some layers are dense, and llama.cpp's qwen3moe has experts in all; no GGUF of this model")


def write_gguf(
    path: Path,
    model: Decoder,
    files: WeightFiles,
    tokenizer: GgufTokenizer,
    *,
    dtype: torch.dtype,
    written: Callable[[int], None] = lambda count: None,
) -> None:
    """Write `path`, one tensor in memory at a time.

    Args:
        path: of the new file.
        model: on the meta device; its config is what is written.
        files: the weights.
        tokenizer: the model's.
        dtype: of the matrices, float32, float16 or bfloat16; vectors and routers are float32 in any case.
        written: told the bytes of each tensor.
    """
    gguf = _import_gguf()
    config = model.config
    arch = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, arch)
    kinds = {
        torch.float32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
        torch.float16: (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
        torch.bfloat16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    }
    writer.add_file_type(kinds[dtype][1])
    for key, value in _metadata(config, model.rope).items():
        _add(writer, f"{arch}.{key}", value)
    for key, value in tokenizer.metadata.items():
        _add(writer, f"tokenizer.{key}", value)

    def stored(name: str, shape: Sequence[int]) -> torch.dtype:
        return dtype if len(shape) > 1 and not name.endswith("mlp.gate.weight") else torch.float32

    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    extra = {} if config.rope_scaling is None else _frequency_factors(config, model.rope)
    for name, shape in shapes.items():
        kind = stored(name, shape)
        _declare(writer, gguf_name(name), shape, kinds[kind][0], kind)
    for name, tensor in extra.items():
        _declare(writer, name, tuple(tensor.shape), kinds[torch.float32][0], torch.float32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape in shapes.items():
        tensor = files.read_ours(name, stored(name, shape))
        if arch == "llama" and name.split(".")[-2] in ("q_proj", "k_proj"):
            tensor = interleave(tensor, config.head_dim)
        writer.write_tensor_data(_array(tensor))
        written(tensor.nbytes)
    for tensor in extra.values():
        writer.write_tensor_data(_array(tensor))
    writer.close()


def gguf_name(name: str) -> str:
    """llama.cpp's name of our parameter `name`."""
    module, _, leaf = name.rpartition(".")
    if module in _TOP:
        return f"{_TOP[module]}.{leaf}"
    _, layer, rest = module.split(".", 2)
    return f"blk.{layer}.{_LAYER[rest]}.{leaf}"


def interleave(tensor: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k (H * D, ...) from halves that rotate together, ours and Hugging Face's, to neighbours that do,
    which is how llama.cpp rotates its architecture "llama"."""
    heads = tensor.unflatten(0, (-1, 2, head_dim // 2))
    return heads.transpose(1, 2).flatten(0, 2).contiguous()


def context_length(config: ModelConfig) -> int:
    """Tokens up to which llama.cpp computes the same: the window, where there is one, as it knows none here."""
    windows = [w.size for i in range(config.num_hidden_layers) if (w := getattr(config, "window", _no_window)(i))]
    return min([config.max_position_embeddings, *windows])


def _no_window(layer: int) -> None:
    return None


def _metadata(config: ModelConfig, rope: RoPE) -> dict[str, Any]:
    c: Any = config
    values: dict[str, Any] = {
        "vocab_size": c.vocab_size,
        "context_length": context_length(c),
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
        "rope.dimension_count": c.head_dim,
        "rope.freq_base": float(c.rope_theta),
    }
    experts = getattr(c, "num_local_experts", getattr(c, "num_experts", None))
    if experts is not None:
        values["expert_count"], values["expert_used_count"] = experts, c.num_experts_per_tok
    if hasattr(c, "moe_intermediate_size"):
        values["expert_feed_forward_length"] = c.moe_intermediate_size
    scaling = c.rope_scaling
    if scaling is not None and scaling.rope_type in ("linear", "yarn"):
        values["rope.scaling.type"] = scaling.rope_type
        values["rope.scaling.factor"] = float(scaling.factor)
    if scaling is not None and scaling.rope_type == "yarn":
        values["rope.scaling.original_context_length"] = scaling.original_max_position_embeddings
        values["rope.scaling.yarn_beta_fast"] = float(scaling.beta_fast)
        values["rope.scaling.yarn_beta_slow"] = float(scaling.beta_slow)
        # llama.cpp multiplies this by 1 + 0.1 ln(factor); ours is the whole amplitude.
        cos, sin = rope(torch.tensor([1]), torch.tensor([1]))
        values["rope.scaling.attn_factor"] = float(torch.hypot(cos, sin).mean()) / (1 + 0.1 * math.log(scaling.factor))
    return values


def _frequency_factors(config: Any, rope: RoPE) -> dict[str, Tensor]:
    """What llama.cpp divides each frequency by, for the scaling of Llama 3."""
    if config.rope_scaling.rope_type != "llama3":
        return {}
    one = torch.tensor([1])
    plain, scaled = RoPE(config.head_dim, theta=config.rope_theta), rope
    # At position 1 the angles are the frequencies.
    angles = [torch.atan2(sin, cos) for cos, sin in (plain(one, one), scaled(one, one))]
    return {"rope_freqs.weight": (angles[0] / angles[1]).flatten()}


def _declare(writer: Any, name: str, shape: tuple[int, ...], kind: Any, dtype: torch.dtype) -> None:
    array = _array(torch.empty(*([1] * len(shape)), dtype=dtype))
    stored = (*shape[:-1], shape[-1] * 2) if array.dtype == "uint8" else shape
    writer.add_tensor_info(name, stored, array.dtype, math.prod(shape) * dtype.itemsize, raw_dtype=kind)


def _array(tensor: Tensor) -> Any:
    """As numpy, which has no bfloat16: that goes as bytes."""
    tensor = tensor.contiguous()
    return (tensor.view(torch.uint8) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _import_gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise missing_extra("gguf", "gguf") from None
    return gguf
