"""Data parallelism: DDP (whole copies) and FSDP2 (sharded parameters; with whole copies of the shards, HSDP).

Both sum gradients over ranks, in buckets or layer by layer while the backward still runs. torch averages them; the
caller multiplies the loss by the number of ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nanoworks.config.parallel import ParallelSection
from nanoworks.models import Decoder

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Compute = Callable[[Decoder, Any], Any]


def shard_parameters(
    model: Decoder, mesh: DeviceMesh, section: ParallelSection, compute_dtype: torch.dtype, device: torch.device
) -> None:
    """FSDP2 in place over `mesh`: one dimension shards; of two the first holds copies of the shards.

    A layer is one unit, gathered just before it runs. Embedding and head are units of their own unless they share their
    matrix. Norms and residuals keep their dtype: only what a layer gathers is in `compute_dtype`, and the embedding
    stays float32 because the residual begins with it.
    """
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    def dtype(choice: str) -> torch.dtype | None:
        return None if choice == "float32" or compute_dtype == torch.float32 else compute_dtype

    precision = MixedPrecisionPolicy(
        param_dtype=dtype(section.gather_dtype),
        reduce_dtype=dtype(section.reduce_dtype) or torch.float32,
        cast_forward_inputs=False,
    )
    options: dict[str, Any] = {"mesh": mesh}
    if section.cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    for layer in model.layers:
        fully_shard(layer, **options, mp_policy=precision, reshard_after_forward=section.reshard_after_forward)
    if not model.config.tie_word_embeddings:
        fully_shard(model.embed_tokens, **options)
        # Its input is the last output and its backward begins at once: freeing it in between would gather it twice.
        fully_shard(model.head, **options, mp_policy=precision, reshard_after_forward=False)
        for method in ("loss", "logprobs"):
            register_fsdp_forward_method(model.head, method)
    fully_shard(model, **options)


class Replicas:
    """DDP around what a stage computes with the model, not around the model: its methods and names stay."""

    def __init__(self, model: Decoder, group: Any, device: torch.device) -> None:
        self._step: Any = nn.parallel.DistributedDataParallel(
            _Step(model),
            process_group=group,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )

    def __call__(self, compute: Compute, batch: Any, *, last: bool) -> Any:
        """`compute(model, batch)`; gradients are summed in the backward of the last micro-batch."""
        with contextlib.nullcontext() if last else self._step.no_sync():
            return self._step(_Call(compute, batch))


class _Call:
    """Opaque to DDP, which would move tensors that it finds among its arguments."""

    def __init__(self, compute: Compute, batch: Any) -> None:
        self.compute, self.batch = compute, batch


class _Step(nn.Module):
    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, call: _Call) -> Any:
        return call.compute(self.model, call.batch)


@torch.no_grad()
def sum_gradients(parameters: Sequence[nn.Parameter], group: Any) -> None:
    """Add up over `group` the gradients of parameters of which each rank computed a part, in one message."""
    from torch.distributed import all_reduce

    from nanoworks.parallel.shards import local

    gradients: list[Tensor] = [local(p.grad) for p in parameters if p.grad is not None]
    if gradients:
        flat = torch.cat([g.flatten() for g in gradients])
        all_reduce(flat, group=group)
        for g, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            g.copy_(part.view_as(g))
