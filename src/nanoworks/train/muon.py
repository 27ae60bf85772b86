"""Muon: momentum whose update is orthogonalised, for the matrices inside the layers.

Keller Jordan et al., https://kellerjordan.github.io/posts/muon/. The update of a matrix is its Nesterov
momentum with all singular values pulled towards 1 by five steps of a Newton-Schulz iteration. Matrices of
one shape are stacked and iterated together, because a small model has many small matrices. A parameter that is
itself a stack (of experts) is so many matrices. Where ranks hold parts of a parameter, the momentum is in such parts as
well, and each matrix is orthogonalised on one of the ranks (`parallel.matrices`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from nanoworks.parallel.matrices import on_whole_matrices
from nanoworks.parallel.shards import as_part_of, local

_A, _B, _C = 3.4445, -4.7750, 2.0315
_MAX_STACK = 2**26  # elements worked on at once: bounds the copies of gradients in a large model


def newton_schulz(g: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return roughly U V^T of the singular value decomposition U S V^T of each matrix of g (n, rows, cols).

    The result is of `dtype`. The coefficients of the quintic were chosen for speed, not for an exact limit:
    singular values end between about 0.7 and 1.2. Each product and sum is rounded to `dtype`, bfloat16 as in the
    original; rounding is amplified, so fusing them (baddbmm) would change the update by some percent.
    """
    tall = g.size(-2) > g.size(-1)
    x = g.to(dtype)
    if tall:
        x = x.mT.contiguous()
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = torch.bmm(x, x.mT)
        polynomial = torch.bmm(_C * s, s).add_(_B * s)
        x = torch.bmm(polynomial, x).add_(_A * x)
    return x.mT if tall else x


class Muon:
    """Muon over named matrices. The state is one momentum tensor a parameter.

    A parameter without a gradient counts as having a gradient of zero.
    """

    def __init__(self, parameters: Sequence[tuple[str, Parameter]]) -> None:
        # Every rank must form the same stacks: by the shape of the whole and how it is spread, not by that of a part.
        alike: dict[tuple[Any, ...], list[tuple[str, Parameter]]] = {}
        for name, p in parameters:
            spread = getattr(p, "device_mesh", None), getattr(p, "placements", None)
            alike.setdefault((p.shape, p.dtype, p.device, *spread), []).append((name, p))
        self._stacks: list[tuple[list[tuple[str, Parameter]], Tensor]] = []
        for (shape, *_), members in alike.items():
            size = max(1, _MAX_STACK // shape.numel())
            for i in range(0, len(members), size):
                part, own = members[i : i + size], local(members[0][1])
                self._stacks.append((part, own.new_zeros(len(part), *own.shape)))

    @torch.no_grad()
    def step(self, lr: float, momentum: float) -> None:
        """Update every parameter; one with more rows than columns takes sqrt(rows / cols) times `lr`."""
        for members, buffer in self._stacks:
            grads = torch.stack([torch.zeros_like(local(p)) if p.grad is None else local(p.grad) for _, p in members])
            buffer.lerp_(grads, 1 - momentum)
            first = members[0][1]
            update = on_whole_matrices(newton_schulz, grads.lerp_(buffer, momentum), first)
            rows, cols = first.shape[-2:]
            scale = max(1.0, rows / cols) ** 0.5
            for (_, p), u in zip(members, update, strict=True):
                local(p).add_(u, alpha=-lr * scale)

    def zero_grad(self) -> None:
        for members, _ in self._stacks:
            for _, p in members:
                p.grad = None

    def momentum(self) -> dict[str, Tensor]:
        """Return the momentum of each parameter by name, spread as it is: the state itself, not a copy."""
        return {
            name: as_part_of(p, buffer[i]) for members, buffer in self._stacks for i, (name, p) in enumerate(members)
        }
