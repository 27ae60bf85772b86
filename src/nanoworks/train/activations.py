"""What autograd keeps for the backward pass of a model, found by running its forward on a few tokens and looking.

On an accelerator's behalf the model runs on the meta device, so nothing is computed and nothing allocated; for a CPU,
where layers are autograd functions of their own (`nn.functional`), it runs for real. Two lengths tell what grows with
the tokens from what does not (copies of weights in the dtype of the arithmetic). Attention is not run: `_Context`
keeps what the kernels keep, so that a row's true length can be reckoned with.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanoworks.models import Decoder, build_model
from nanoworks.nn import blocked_attention
from nanoworks.nn.context import PLAIN, Attending
from nanoworks.nn.linear import GroupedLinear, set_compute_dtype
from nanoworks.nn.moe import MoE
from nanoworks.nn.recompute import kept_operators

_SHORT, _LONG = 16, 32  # fewer rows of a product take another path on a CPU


@dataclass(frozen=True)
class Kept:
    """Bytes kept for backward: a number for each layer, and one for what is around them."""

    layers: tuple[int, ...]
    """For each token of a row of `sequence_length`, attention included, when nothing is computed again."""
    products: tuple[int, ...]
    """For each token, what selective activation checkpointing keeps (`nn.recompute`) besides a layer's input."""
    copies: tuple[int, ...]
    """Of weights, whatever the number of tokens."""
    around: int
    """For each token: embedding, what a family adds between layers, the final norm."""


def trace_activations(
    model: Decoder, *, sequence_length: int, dtype: torch.dtype, device: torch.device, documents: bool = False
) -> Kept:
    """Run `model` (on any device, meta included; it is left as it was) forward in `dtype` as on `device`.

    `documents`: attention is kept inside documents, which needs a mask.
    """
    twin = _twin(model, device)
    set_compute_dtype(twin, None if dtype == torch.float32 else dtype)
    twin.train()
    few, more = (_run(twin, tokens, sequence_length, device, documents) for tokens in (_SHORT, _LONG))
    count = len(twin.layers)
    slopes = [(b - a) / (_LONG - _SHORT) for a, b in zip(few.kept, more.kept, strict=True)]
    products = [(b - a) / (_LONG - _SHORT) for a, b in zip(few.products, more.products, strict=True)]
    fixed = [a - slope * _SHORT for a, slope in zip(few.kept, slopes, strict=True)]
    return Kept(
        layers=tuple(round(slope) for slope in slopes[:count]),
        products=tuple(round(slope) for slope in products[:count]),
        copies=tuple(max(0, round(value)) for value in fixed[:count]),
        around=round(slopes[count]) + _final_norm(model, dtype),
    )


def _twin(model: Decoder, device: torch.device) -> Decoder:
    """A model of the same shapes to run: on the meta device, or for a CPU with memory behind it."""
    if device.type == "cpu" and not next(model.parameters()).is_meta:
        return _shared(model)
    with torch.device("meta"):
        twin = build_model(model.config)
    if device.type == "cpu":
        twin.to_empty(device="cpu")  # pages that are only read stay the system's page of zeros
    for module in twin.modules():
        if isinstance(module, GroupedLinear) and device.type != "cpu":
            module.forward = partial(_grouped, module)  # type: ignore[method-assign]
        if isinstance(module, MoE) and device.type == "cpu":  # zeros would send every token to the same experts
            nn.init.normal_(module.gate.weight)
            nn.init.normal_(twin.embed_tokens.weight)
    return twin


def _shared(model: Decoder) -> Decoder:
    """A copy of the modules around the same parameters, whose settings can be changed."""
    memo: dict[int, Any] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, memo)


def _run(model: Decoder, tokens: int, sequence_length: int, device: torch.device, documents: bool) -> _Counts:
    own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    counts = _Counts(len(model.layers))
    seen: dict[int, Any] = {}

    def enter(layer: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counts.where = layer

        return hook

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in seen:
            seen[storage._cdata] = storage  # held, or its address would name another
            counts.kept[counts.where] += storage.nbytes()
        return tensor

    handles = [layer.register_forward_pre_hook(enter(i)) for i, layer in enumerate(model.layers)]
    handles += [layer.register_forward_hook(enter(len(model.layers))) for layer in model.layers]
    model.activation_checkpointing = "none"
    home = next(model.parameters()).device
    if home.type == "meta":  # where `_grouped` stands for the operator
        grouped = [module for module in model.modules() if isinstance(module, GroupedLinear)]
        handles += [leaf.register_forward_hook(lambda _, args, y: counts.add_product(y)) for leaf in grouped]
    try:
        ids = torch.arange(tokens, device=home).remainder(model.config.vocab_size)[None]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), counts:
            model(ids, _Context(ids, sequence_length, device, documents, counts))
    finally:
        for handle in handles:
            handle.remove()
    return counts


class _Counts(TorchDispatchMode):
    """Bytes by layer and, last, of the rest."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.where = layers
        self.kept, self.products = [0] * (layers + 1), [0] * (layers + 1)

    def add_product(self, *results: Tensor) -> None:
        self.products[self.where] += sum(t.untyped_storage().nbytes() for t in results)

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = operator(*args, **(kwargs or {}))
        if operator in kept_operators():
            self.add_product(*[t for t in tree_leaves(found) if isinstance(t, Tensor)])
        return found


class _Context:
    """`DenseContext` whose attention only keeps what attention keeps."""

    def __init__(
        self, tokens: Tensor, sequence_length: int, device: torch.device, documents: bool, counts: _Counts
    ) -> None:
        self.positions = torch.arange(tokens.size(1), device=tokens.device)
        self.prev_tokens = torch.full_like(tokens, -1)
        self.lengths = torch.full((), tokens.size(1), device=tokens.device)
        self.routing: dict[int, Any] | None = {}
        self._length, self._device, self._documents, self._counts = sequence_length, device, documents, counts

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, how: Attending = PLAIN) -> Tensor:
        """q (1, t, H, D), k and v (1, t, K, D) -> (1, t, H, D); keeps what each token of a whole row would."""
        T = self._length
        masked, plain = self._documents or (how.window is not None and how.window.size < T), how.plain
        heads, size = q.size(2), q.element_size()
        extra = 0.0
        blocked = self._device.type == "cpu" and plain and not masked and _blocked(q, T)
        if blocked:
            extra = size * heads * blocked_attention.kept_probabilities(T) / T
        elif not plain:  # scores, their softmax, and keys and values repeated for every head
            extra = (4 + 2 * size) * heads * T
        elif masked:  # a mask of numbers is made of the boolean one
            extra = size * T
        if plain and not blocked:  # a kernel, whose result and statistics stay
            self._counts.add_product(torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32))
        return _Attention.apply(q, k, v, round(extra * q.size(1)), blocked)


def _blocked(q: Tensor, sequence_length: int) -> bool:
    """`blocked_attention.suits` for a row of another length than q's."""
    gains = q.dtype == torch.bfloat16 or (
        sequence_length >= blocked_attention.MIN_TOKENS and q.size(-1) >= blocked_attention._LARGE
    )
    return gains and sequence_length <= blocked_attention.MAX_TOKENS


class _Attention(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, extra: int, blocked: bool) -> Tensor:
        y = torch.empty_like(q, memory_format=torch.contiguous_format)
        more = torch.empty(extra, dtype=torch.uint8, device=q.device)
        if blocked:  # which copies q, k and v by heads; y is copied again on its way out
            ctx.save_for_backward(*(torch.empty_like(q) for _ in range(3)), more)
        else:
            statistics = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
            ctx.save_for_backward(q, k, v, y, statistics, more)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError


def _grouped(leaf: GroupedLinear, x: Tensor, ends: Tensor) -> Tensor:
    """`GroupedLinear.forward` for the meta device, where not every version of PyTorch has the product."""
    dtype = leaf.compute_dtype or x.dtype
    return _Grouped.apply(x.to(dtype), leaf.weight.to(dtype), leaf.out_features)


class _Grouped(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, out_features: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_empty(x.size(0), out_features)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError


def _final_norm(model: nn.Module, dtype: torch.dtype) -> int:
    """A token's bytes at the head: the hidden state and its normed copy, and its gradient, made in the forward."""
    assert isinstance(model, Decoder)
    return model.config.hidden_size * (4 + 4 + 2 * (torch.finfo(dtype).bits // 8))
