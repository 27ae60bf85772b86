"""oneDNN's matrix product for CPU training, used where it is known to work.

`F.linear` reaches MKL for float32 on a CPU, and MKL runs its AVX2 path on AMD processors: 175 GFLOP/s where
oneDNN's AVX-512 kernel reaches 430 on the same two cores. PyTorch ships oneDNN's kernel as an operator of
its own; this file decides when to use it, once per dtype, by running it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import Parameter

_DTYPES = (torch.float32, torch.bfloat16)


def usable(*tensors: Tensor) -> bool:
    """Whether `matmul_nt` may be given these tensors: plain CPU tensors of one dtype that the probe accepted.

    Subclasses (DTensor, fake and quantized tensors), tracing and autocast take PyTorch's own path.
    """
    dtype = tensors[0].dtype
    return (
        all(type(t) in (Tensor, Parameter) and t.dtype == dtype and t.device.type == "cpu" for t in tensors)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and _works(dtype)
    )


def matmul_nt(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`a @ b.T + bias` for a (..., K) and b (N, K), both `usable`. Transposed views need no copy."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


@functools.cache
def _works(dtype: torch.dtype) -> bool:
    """Run the operator on a tiny product: it may be absent from the build or refuse the dtype on this CPU."""
    if dtype not in _DTYPES:
        return False
    a, b = torch.ones(4, 8, dtype=dtype), torch.ones(3, 8, dtype=dtype)
    try:
        return torch.equal(matmul_nt(a, b), torch.full((4, 3), 8.0, dtype=dtype))
    except (AttributeError, RuntimeError):
        return False
