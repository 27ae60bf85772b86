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
from nanoworks.parallel.expert import shard_experts
from nanoworks.parallel.shards import cuts, even_cuts, local

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Compute = Callable[[Decoder, Any], Any]


def shard_parameters(
    model: Decoder,
    mesh: DeviceMesh,
    section: ParallelSection,
    compute_dtype: torch.dtype,
    device: torch.device,
    *,
    experts: DeviceMesh | None = None,
) -> None:
    """FSDP2 in place over `mesh`: one dimension shards; of two the first holds copies of the shards. `experts` is the
    mesh for those that `split_experts` has spread.

    A layer is one unit, gathered just before it runs. Embedding and head are units of their own unless they share their
    matrix. Norms and residuals keep their dtype: only what a layer gathers is in `compute_dtype`, and the embedding
    stays float32 because the residual begins with it.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard, register_fsdp_forward_method

    options: dict[str, Any] = {"mesh": mesh}
    if section.cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    if experts is not None:
        shard_experts(model, {**options, **layer_options(section, compute_dtype, experts), "mesh": experts})
    for layer in model.layers:
        fully_shard(layer, **options, **layer_options(section, compute_dtype, mesh))
    if not model.config.tie_word_embeddings:
        fully_shard(model.embed_tokens, **options)
        # Its input is the last output and its backward begins at once: freeing it in between would gather it twice.
        precision = precision_of(section, compute_dtype)
        fully_shard(model.head, **options, mp_policy=precision, reshard_after_forward=False)
        for method in ("loss", "logprobs"):
            register_fsdp_forward_method(model.head, method)
    fully_shard(model, **options)


def layer_options(section: ParallelSection, compute_dtype: torch.dtype, mesh: DeviceMesh) -> dict[str, Any]:
    """What `fully_shard` is told about layers, of which `mesh` is what they are sharded over."""
    from torch.distributed.tensor import Shard

    def cut(parameter: nn.Parameter) -> Any:
        ranks = mesh.size(-1)
        even = even_cuts(local(parameter).shape, ranks)
        taken = [dim + parameter.ndim for dim in cuts(parameter).values()]
        # Cut by experts, matrices stay whole for Muon; else a dimension that no other ranks cut, joined in one go.
        return Shard(next((dim for dim in even if (dim == 0 and ranks > 1) or dim not in taken), even[0]))

    return {
        "mp_policy": precision_of(section, compute_dtype),
        "reshard_after_forward": section.reshard_after_forward,
        "shard_placement_fn": cut,
    }


def precision_of(section: ParallelSection, compute_dtype: torch.dtype) -> Any:
    """FSDP2's policy for layers: in which dtype they are gathered and their gradients summed."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    def dtype(choice: str) -> torch.dtype | None:
        return None if choice == "float32" or compute_dtype == torch.float32 else compute_dtype

    return MixedPrecisionPolicy(
        param_dtype=dtype(section.gather_dtype),
        reduce_dtype=dtype(section.reduce_dtype) or torch.float32,
        cast_forward_inputs=False,
    )


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

    gradients: list[Tensor] = [local(p.grad) for p in parameters if p.grad is not None]
    if gradients:
        flat = torch.cat([g.flatten() for g in gradients])
        all_reduce(flat, group=group)
        for g, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            g.copy_(part.view_as(g))
