"""What a plan has to know of the devices: a small YAML file for each kind, and `8xH200` for so many of them."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import Field, ValidationError

from nanoworks.common.device import memory_bytes
from nanoworks.common.errors import UserError, nearest
from nanoworks.common.validation import explain
from nanoworks.config.base import Frozen
from nanoworks.nn.flops import peak_flops

PROFILES = Path(__file__).parent / "hardware"


class Hardware(Frozen):
    """One kind of device. Figures are of one device; bandwidths in GB/s (10^9), each direction."""

    name: str
    device: Literal["cuda", "cpu"] = "cuda"
    memory_gib: float | None = Field(default=None, gt=0, description="what a process can have; null: what is free here")
    bf16_tflops: float | None = Field(default=None, gt=0, description="dense; null: measured here")
    fp32_tflops: float | None = Field(default=None, gt=0, description="the same in float32")
    memory_gbs: float = Field(gt=0, description="bandwidth of the device's memory")
    link_gbs: float = Field(gt=0, description="to the other devices of the node")
    network_gbs: float = Field(gt=0, description="a device's share of the network between nodes")
    devices_per_node: int = Field(gt=0)
    latency_us: float = Field(default=15, ge=0, description="of a collective inside a node; between nodes twice that")
    efficiency: float = Field(default=0.7, gt=0, le=1, description="what large products reach of the peak")
    dollars_per_hour: float = Field(default=0, ge=0)

    def memory(self) -> int:
        """Bytes."""
        return memory_bytes(torch.device(self.device)) if self.memory_gib is None else round(self.memory_gib * 2**30)

    def peak(self, dtype: torch.dtype) -> float:
        """FLOP/s."""
        tflops = self.bf16_tflops if dtype == torch.bfloat16 else self.fp32_tflops
        return peak_flops(torch.device(self.device), dtype) if tflops is None else tflops * 1e12


@dataclass(frozen=True)
class Cluster:
    """`count` devices of one kind, in nodes of `hardware.devices_per_node`."""

    hardware: Hardware
    count: int

    def __str__(self) -> str:
        return self.hardware.name if self.count == 1 else f"{self.count}x{self.hardware.name}"

    @property
    def nodes(self) -> int:
        return math.ceil(self.count / self.hardware.devices_per_node)

    def memory(self) -> int:
        """Bytes that one device has to itself: what is free of a machine is shared by its processes."""
        return self.hardware.memory() // self._sharing

    def peak(self, dtype: torch.dtype) -> float:
        """FLOP/s of one device. What is measured is of one process, whose threads may leave cores to others."""
        peak = self.hardware.peak(dtype)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return peak * min(1.0, cores / (self._sharing * torch.get_num_threads())) if self._sharing > 1 else peak

    @property
    def _sharing(self) -> int:
        return min(self.count, self.hardware.devices_per_node) if self.hardware.device == "cpu" else 1


def cluster(text: str) -> Cluster:
    """`8xH200`, `cpu` or `2xmine.yaml`: a number, and a profile that comes along or a file of the same form.

    Raises:
        UserError: no such profile, or a file that is none.
    """
    match = re.fullmatch(r"(?:(\d+)\s*[xX*]\s*)?(.+)", text.strip())
    count = int(match[1] or 1) if match else 0
    if match is None or count < 1:
        raise UserError(f"--gpus {text!r}: write a number, an x and a kind of device, like 8xH200, or cpu")
    return Cluster(_profile(match[2]), count)


def _profile(name: str) -> Hardware:
    file = Path(name) if name.endswith((".yaml", ".yml")) else PROFILES / f"{name.lower()}.yaml"
    if not file.is_file():
        known = sorted(p.stem for p in PROFILES.glob("*.yaml"))
        raise UserError(
            f"--gpus: no profile of {name!r}{nearest(name.lower(), known)}; there are {', '.join(known)}, or give a "
            "YAML file with the same keys, like 8xmine.yaml"
        )
    values: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    try:
        return Hardware(**values)
    except ValidationError as error:
        raise UserError(f"{file}:\n{explain(error, Hardware)}") from None
    except TypeError:
        raise UserError(f"{file}: a mapping is expected, with the keys of the profiles that come along") from None


def here(device: torch.device) -> Hardware:
    """The profile of `device`, which is in this machine, with as many to a node as torchrun started; of a GPU that none
    names, the 24 GB card's with its own memory and rates measured."""
    nodes = {"devices_per_node": int(os.environ["LOCAL_WORLD_SIZE"])} if "LOCAL_WORLD_SIZE" in os.environ else {}
    if device.type != "cuda":
        return _profile("cpu").model_copy(update=nodes)
    name = torch.cuda.get_device_name(device)
    for file in sorted(PROFILES.glob("*.yaml")):
        profile = _profile(file.stem)
        if profile.name in name:
            return profile.model_copy(update=nodes)
    unknown = {"name": name, "memory_gib": memory_bytes(device) / 2**30, "bf16_tflops": None, "fp32_tflops": None}
    return _profile("24gb").model_copy(update={**unknown, **nodes})
