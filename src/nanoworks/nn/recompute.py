"""Activation checkpointing: what a layer computes anew in backward instead of keeping it.

"full" keeps a layer's input alone. "selective" also keeps the results of matrix products and of attention kernels: they
are nearly all of the arithmetic, and about half of what autograd would keep.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from nanoworks.config.recipe import Checkpointing
from nanoworks.nn import onednn

_KEPT = {
    "aten": (
        "mm",
        "addmm",
        "_grouped_mm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    ),
    "mkldnn": ("_linear_pointwise",),
}


def run_layer(how: Checkpointing, layer: Callable[..., Tensor], *args: Any) -> Tensor:
    """`layer(*args)`, with so much of it computed again in backward."""
    if how == "none":
        return layer(*args)
    if how == "full":
        return checkpoint(layer, *args, use_reentrant=False)
    onednn.works()  # its trial, made once a process, would be one product more in the first forward than in backward
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(layer, *args, use_reentrant=False, context_fn=contexts)


@cache
def kept_operators() -> frozenset[Any]:
    """Whose results "selective" keeps: those that this build of PyTorch has."""
    found = [getattr(getattr(torch.ops, space), name, None) for space, names in _KEPT.items() for name in names]
    return frozenset(packet.default for packet in found if packet is not None)


def _policy(context: Any, operator: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    # bmm is not kept: where it is attention by hand, its results are probabilities, T for each token and head.
    return CheckpointPolicy.MUST_SAVE if operator in kept_operators() else CheckpointPolicy.PREFER_RECOMPUTE
