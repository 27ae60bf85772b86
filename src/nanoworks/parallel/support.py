"""Which kinds of parallelism train, with which optimizer: the table that tests run and docs/scaling.md shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """One row: the `parallel` section that makes it, on so many ranks in the tests."""

    name: str
    ranks: int
    section: Mapping[str, Any]
    whole_matrices: bool = False
    """Whether each rank has all of a matrix, as muon_adamw_2026 needs."""


KINDS = (
    Kind("DDP", 2, {"replicate": 2}, whole_matrices=True),
    Kind("FSDP2", 2, {"shard": 2}),
    Kind("FSDP2 on 4", 4, {}),
    Kind("FSDP2 kept", 2, {"reshard_after_forward": False}),
    Kind("FSDP2 on the host", 2, {"cpu_offload": True}),
    Kind("HSDP", 4, {"replicate": 2, "shard": 2}),
    Kind("TP", 2, {"tensor": 2}),
    Kind("TP on 4", 4, {"tensor": 4}),
    Kind("TP + SP", 2, {"tensor": 2, "sequence_parallel": True}),
    Kind("TP + SP + loss", 2, {"tensor": 2, "sequence_parallel": True, "loss_parallel": True}),
    Kind("TP x DDP", 4, {"tensor": 2, "replicate": 2, "shard": 1}),
    Kind("TP x FSDP2", 4, {"tensor": 2, "shard": 2, "loss_parallel": True}),
    Kind("TP + SP x FSDP2", 4, {"tensor": 2, "shard": 2, "sequence_parallel": True}),
)


def table() -> str:
    """The kinds as Markdown."""
    lines = [
        "| Kind | `parallel` on so many ranks | adamw, muon_adamw | muon_adamw_2026 |",
        "| --- | --- | --- | --- |",
    ]
    for kind in KINDS:
        keys = ", ".join(f"{key}={str(value).lower()}" for key, value in kind.section.items()) or "the default"
        newest = "yes" if kind.whole_matrices else "refused: it needs whole matrices"
        lines.append(f"| {kind.name} | {keys} ({kind.ranks}) | yes | {newest} |")
    return "\n".join(lines) + "\n"
