"""The norm of gradients that are spread over ranks in more than one way.

torch's `clip_grad_norm_` wants all of them on one mesh. A sum of squares does not care: each rank adds up its parts,
each divided by how many ranks hold the same part, and one number is summed over all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

from nanoworks.parallel.shards import copies, local


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[tuple[str, Parameter]],
    max_norm: float,
    *,
    ranks: int,
    total: Callable[[Tensor], Tensor],
    elsewhere: Collection[str] = (),
) -> float:
    """Scale gradients to a global norm of at most `max_norm` (0: leave them); return the norm before.

    Args:
        ranks: how many have a part of these parameters: all, or those of one pipeline stage.
        total: sums a scalar over all ranks of the world.
        elsewhere: names of parameters that another pipeline stage counts.
    """
    held = [(name, p.grad) for name, p in parameters if p.grad is not None]
    parts = [(local(g), 0.0 if name in elsewhere else 1 / copies(g, ranks)) for name, g in held]
    norms = _norms([g for g, _ in parts])
    squares = [norm.double().square() * share for norm, (_, share) in zip(norms, parts, strict=True)]
    square = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)
    norm = total(square.float()).sqrt()
    if max_norm > 0 and parts:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([g for g, _ in parts], factor.to(parts[0][0].device))
    return float(norm)


def _norms(gradients: list[Tensor]) -> list[Tensor]:
    return list(torch._foreach_norm(gradients)) if gradients else []
