"""oneDNN's float32 matrix product for CPU training, used where it is known to work.

PyTorch sends a float32 product on a CPU to MKL, which runs its AVX2 path on AMD processors: less than half the
speed of oneDNN's AVX-512 kernels at the same precision. PyTorch ships oneDNN's product as an operator of
its own; `usable` says when to call it. bfloat16 needs nothing of the kind: PyTorch uses oneDNN for it already.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import Parameter

_MIN_ROWS = 16  # for fewer, MKL is as fast and needs no packing of b


def plain_cpu(*tensors: Tensor) -> bool:
    """Whether hand-written CPU code may run: ordinary CPU tensors, all float32 or all bfloat16, in eager mode.

    Subclasses (DTensor, fake tensors), tracing and autocast need PyTorch's own operators.
    """
    dtype = tensors[0].dtype
    return (
        not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and dtype in (torch.float32, torch.bfloat16)
        and all(type(t) in (Tensor, Parameter) and t.dtype == dtype and t.device.type == "cpu" for t in tensors)
    )


def trains_on_cpu(*tensors: Tensor) -> bool:
    """Whether to take a path whose gain is in the backward; without one PyTorch's own operators are faster."""
    return torch.is_grad_enabled() and plain_cpu(*tensors)


def usable(a: Tensor, *others: Tensor) -> bool:
    """Whether `matmul_nt` may and should multiply a (..., K) with `others`."""
    enough_rows = a.numel() >= _MIN_ROWS * max(1, a.size(-1))
    return enough_rows and a.dtype == torch.float32 and plain_cpu(a, *others) and works()


def matmul_nt(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`a @ b.T + bias` for a (..., K), b (N, K) and bias (N,), all `usable`."""
    if not (b.is_contiguous() or b.t().is_contiguous()):
        b = b.contiguous()  # for other strides oneDNN has only a reference kernel, a thousand times slower
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


@functools.cache
def works() -> bool:
    """Run the operator on a tiny product: a build may lack it, a processor may refuse it."""
    try:
        return torch.equal(matmul_nt(torch.ones(4, 8), torch.ones(3, 8)), torch.full((4, 3), 8.0))
    except (AttributeError, RuntimeError):
        return False
