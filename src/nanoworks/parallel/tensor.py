"""Tensor parallelism for inference: each rank holds an equal slice of the matrices that the family's plan names.

A leaf that the plan calls "colwise" is cut along its outputs, so a rank computes its own heads or features; one that
is "rowwise" is cut along its inputs, so what the ranks give must be summed, which is the only communication there is:
two sums a layer (https://arxiv.org/abs/1909.08053). Everything else, embedding and head included, is whole on every
rank. Models do not learn of it (they never name a number of heads in forward).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from nanoworks.common.errors import UserError
from nanoworks.config.model import ModelConfig
from nanoworks.models import ARCHITECTURES, Decoder
from nanoworks.nn.moe import MoE

AllReduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all ranks; may do so in place."""


@dataclass(frozen=True)
class Shard:
    """The `rank`-th of `n` equal shares of a model."""

    rank: int
    n: int

    def cut(self, model: Decoder) -> Callable[[str, Tensor], Tensor]:
        """Keep this share of `model`, which may be on the meta device, and return what takes the share of a tensor.

        The function returned maps (parameter's name, whole tensor) to the slice that belongs to this rank, so that a
        loader never holds more than one whole tensor. A rowwise leaf's bias stays with rank 0, or it would be summed.

        Raises:
            UserError: the family has no plan, or `n` does not divide what has to be divided.
        """
        check_divisible(model.config, self.n)
        for name, style in planned(model).items():
            leaf: Any = model.get_submodule(name)
            dim = 0 if style == "colwise" else 1
            if isinstance(leaf, nn.Embedding):  # its outputs are the columns of its table
                dim = 1 - dim
                self._check_size(name, leaf.weight.size(dim))
                leaf.weight = nn.Parameter(self._slice(leaf.weight.detach(), dim))
                continue
            self._check_size(name, leaf.in_features if dim else leaf.out_features)
            leaf.shard(dim, self.rank, self.n)
            if style == "rowwise" and self.rank and getattr(leaf, "bias", None) is not None:
                leaf.bias = None
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

        def take(name: str, tensor: Tensor) -> Tensor:
            for dim, size in enumerate(shapes.get(name, ())):
                if tensor.size(dim) != size:
                    tensor = self._slice(tensor, dim)
            return tensor

        return take

    def _slice(self, tensor: Tensor, dim: int) -> Tensor:
        return tensor.chunk(self.n, dim)[self.rank].clone(memory_format=torch.contiguous_format)

    def _check_size(self, name: str, size: int) -> None:
        if size % self.n:
            raise UserError(
                f"tensor_parallel={self.n} does not divide the {size} features of {name}; take a divisor of {size}"
            )


class Summed(nn.Module):
    """A module whose outputs on all ranks are summed: a rowwise leaf, or a mixture of experts."""

    def __init__(self, leaf: nn.Module, all_reduce: AllReduce) -> None:
        super().__init__()
        self.leaf = leaf
        self._all_reduce = all_reduce

    def forward(self, *inputs: Any) -> Tensor:
        return self._all_reduce(self.leaf(*inputs))


def join(model: Decoder, all_reduce: AllReduce) -> None:
    """Make a share that `Shard.cut` left compute what the whole model does, together with the other ranks.

    A mixture of experts is summed as a whole: its weights for the experts are the same on every rank.
    """
    mixtures = [name for name, module in model.named_modules() if isinstance(module, MoE)]
    rowwise = [name for name, style in planned(model).items() if style == "rowwise"]
    for name in dict.fromkeys(next((m for m in mixtures if leaf.startswith(f"{m}.")), leaf) for leaf in rowwise):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Summed(model.get_submodule(name), all_reduce))


def planned(model: Decoder) -> dict[str, str]:
    """ "colwise" or "rowwise" for the name of every module that the plan of the family names, in the model's order."""
    plan = ARCHITECTURES.get(model.config.model_type).tp_plan
    styles = {}
    for name, _ in model.named_modules():
        style = next((style for pattern, style in plan.items() if fnmatchcase(name, pattern)), None)
        if style is not None:
            styles[name] = style
    return styles


def check_divisible(config: ModelConfig, n: int) -> None:
    """UserError when a model of `config` cannot be cut into `n` shares."""
    family = config.model_type
    if not ARCHITECTURES.get(family).tp_plan:
        known = ", ".join(name for name in ARCHITECTURES if ARCHITECTURES.get(name).tp_plan)
        raise UserError(f"the family {family} has no plan for tensor_parallel (those with one: {known}); use 1")
    heads = {name: getattr(config, name) for name in ("num_attention_heads", "num_key_value_heads")}
    if any(count % n for count in heads.values()):
        least = min(heads.values())
        fits = [d for d in range(1, least + 1) if all(count % d == 0 for count in heads.values())]
        counts = " and ".join(f"{name}={count}" for name, count in heads.items())
        raise UserError(f"tensor_parallel={n} must divide {counts}; use {' or '.join(map(str, fits))}")
