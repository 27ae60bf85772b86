"""Work on whole matrices of which each rank holds some rows or columns, shared out among the ranks.

Muon orthogonalises each matrix as a whole. With n matrices of one shape on W ranks, each rank receives n / W of them
whole, works, and sends the parts back: two all-to-alls that move together 2 / W of what an all-gather of all matrices
would, and no matrix is worked on twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoworks.parallel.shards import as_part_of, cuts, full, part_of

Work = Callable[[Tensor], Tensor]
"""Maps matrices (n, rows, cols) to as many of the same shape, each by itself."""


def on_whole_matrices(work: Work, parts: Tensor, parameter: Any) -> Tensor:
    """`work` on n tensors that are spread as `parameter` is.

    Args:
        parts: (n, ..., rows, cols), this rank's part of each; what comes before rows counts further matrices (experts).

    Returns:
        This rank's part of each result. Every rank that holds a part of `parameter` must call this.
    """
    dims = {mesh_dim: dim for mesh_dim, dim in cuts(parameter).items() if dim >= -2}
    if not dims:
        return work(parts.flatten(0, -3)).view_as(parts) if parts.numel() else parts.to(work(parts.new_ones(1, 1, 1)))
    if len(dims) == 1:
        [(mesh_dim, dim)] = dims.items()
        return _exchanged(work, parts, parameter, mesh_dim, by_columns=dim == -1)
    # Cut twice (FSDP2 over tensor parallel): gathered, and worked on by each rank.
    whole = torch.stack([full(as_part_of(parameter, part)) for part in parts])
    done = work(whole.flatten(0, -3)).view_as(whole)
    return torch.stack([part_of(parameter, result) for result in done])


def _exchanged(work: Work, parts: Tensor, parameter: Any, mesh_dim: int, *, by_columns: bool) -> Tensor:
    from torch.distributed import all_to_all_single

    group, ranks = parameter.device_mesh.get_group(mesh_dim), parameter.device_mesh.size(mesh_dim)
    flat = parts.flatten(0, -3)
    lines = flat.mT if by_columns else flat  # (N, own, width): the dimension that is cut comes first
    number, own, width = lines.shape
    total = parameter.size(-1 if by_columns else -2)
    chunk, share = -(-total // ranks), -(-number // ranks)

    def exchange(x: Tensor) -> Tensor:
        x = x.contiguous()
        received = torch.empty_like(x)
        all_to_all_single(received, x, group=group)
        return received

    padded = F.pad(lines, (0, 0, 0, chunk - own, 0, share * ranks - number))
    received = exchange(padded.view(ranks, share, chunk, width))
    mine = received.transpose(0, 1).reshape(share, ranks * chunk, width)[:, :total]
    done = work(mine.mT if by_columns else mine)
    done = F.pad(done.mT if by_columns else done, (0, 0, 0, ranks * chunk - total))
    back = exchange(done.reshape(share, ranks, chunk, width).transpose(0, 1))
    result = back.reshape(share * ranks, chunk, width)[:number, :own]
    return (result.mT if by_columns else result).reshape(parts.shape)
