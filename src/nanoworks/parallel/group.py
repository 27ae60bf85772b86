"""A group of processes that sum tensors, apart from torch's global process group, so that several may live at once."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = timedelta(minutes=5)
"""How long a rank waits for another in a sum. One that ended is noticed at once; this is for one that hangs."""


class Group:
    """Joins `size` ranks of this machine that meet at `file`, which must not exist before the first comes.

    NCCL between GPUs, gloo over the loopback address on a CPU.
    """

    def __init__(self, file: Path, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size = rank, size
        store = dist.FileStore(str(file), size)
        self._group: Any
        if device.type == "cuda":
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = TIMEOUT
            self._group = dist.ProcessGroupNCCL(store, rank, size, nccl)
        else:
            backend: Any = dist.ProcessGroupGloo  # the type stubs lack what its options need
            gloo = backend._Options()
            gloo._timeout = TIMEOUT
            gloo._devices = [backend.create_device(hostname="127.0.0.1")]
            self._group = backend(store, rank, size, gloo)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum of `tensor` over all ranks, to the bit the same on each; in place where it is contiguous."""
        tensor = tensor.contiguous()
        self._group.allreduce([tensor]).wait()
        return tensor

    def __deepcopy__(self, _: object) -> Group:
        return self  # a model that is copied stays with the same ranks
