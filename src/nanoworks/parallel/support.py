"""Which kinds of parallelism train, with which optimizer (the table that tests run and docs/scaling.md shows), and what
is refused.

Imports nothing of torch.distributed: a plan is made, and a mistake told, without the seconds that takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nanoworks.config.parallel import ParallelSection
from nanoworks.config.recipe import Checkpointing
from nanoworks.parallel.mesh import Degrees


@dataclass(frozen=True)
class Kind:
    """One row: the `parallel` section that makes it, on so many ranks in the tests."""

    name: str
    ranks: int
    section: Mapping[str, Any]
    refused: Mapping[str, str] = field(default_factory=lambda: {"muon_adamw_2026": "it needs whole matrices"})
    """Optimizer -> the reason why it does not go with this kind."""
    experts: bool = False
    """Only models that have experts."""

    def trains(self, optimizer: str) -> bool:
        return optimizer not in self.refused


_MUON = ("muon_adamw", "muon_adamw_2026")
OPTIMIZERS = ("adamw", *_MUON)
_PIECES = "ZeRO steps flat pieces of parameters"

KINDS = (
    Kind("DDP", 2, {"replicate": 2}, refused={}),
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
    *(
        Kind(f"PP {schedule}", 2, {"pipeline": 2, "pipeline_schedule": schedule}, refused={})
        for schedule in ("gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv")
    ),
    Kind("PP on 4", 4, {"pipeline": 4}, refused={}),
    Kind("PP x DDP", 4, {"pipeline": 2, "replicate": 2, "shard": 1}),
    Kind("PP x FSDP2", 4, {"pipeline": 2, "shard": 2}),
    Kind("PP interleaved x FSDP2", 4, {"pipeline": 2, "shard": 2, "pipeline_schedule": "interleaved_1f1b"}),
    Kind("PP zbv x FSDP2", 4, {"pipeline": 2, "shard": 2, "pipeline_schedule": "zbv"}),
    Kind("EP", 2, {"expert": 2, "replicate": 2, "shard": 1}, experts=True),
    Kind("EP x DDP", 4, {"expert": 2, "replicate": 4, "shard": 1}, experts=True),
    Kind("EP on FSDP2", 2, {"expert": 2, "shard": 2}, experts=True),
    Kind("EP x FSDP2", 4, {"expert": 2, "shard": 4}, experts=True),
    Kind("EP x HSDP", 4, {"expert": 2, "replicate": 2, "shard": 2}, experts=True),
    Kind("CP all_gather", 2, {"context": 2}),
    Kind("CP ulysses", 2, {"context": 2, "context_method": "ulysses"}),
    Kind("CP on 4", 4, {"context": 4}),
    Kind("CP x DDP", 4, {"context": 2, "replicate": 2, "shard": 1}),
    Kind("CP x FSDP2", 4, {"context": 2, "shard": 2}),
    Kind("CP ulysses x TP", 4, {"context": 2, "context_method": "ulysses", "tensor": 2}),
    Kind("CP x TP + SP + loss", 4, {"context": 2, "tensor": 2, "sequence_parallel": True, "loss_parallel": True}),
    *(
        Kind(f"ZeRO {stage}", 2, {"strategy": "deepspeed", "zero_stage": stage}, refused=dict.fromkeys(_MUON, _PIECES))
        for stage in (1, 2, 3)
    ),
)


def table() -> str:
    """The kinds as Markdown."""
    lines = [
        f"| Kind | `parallel` on so many ranks | {' | '.join(OPTIMIZERS)} |",
        f"| --- | --- |{' --- |' * len(OPTIMIZERS)}",
    ]
    for kind in KINDS:
        keys = ", ".join(f"{key}={str(value).lower()}" for key, value in kind.section.items()) or "the default"
        answers = (f"refused: {kind.refused[o]}" if o in kind.refused else "yes" for o in OPTIMIZERS)
        lines.append(f"| {kind.name} | {keys} ({kind.ranks}) | {' | '.join(answers)} |")
    return "\n".join(lines) + "\n"


def refusal(
    section: ParallelSection, found: Degrees, *, compile: bool = False, checkpointing: Checkpointing = "none"
) -> str | None:
    """Why these do not go together, or None: the table of docs/scaling.md is made from this."""
    if section.cpu_offload and found.shard * found.context == 1:
        return "cpu_offload is FSDP2's: it needs shard of 2 or more"
    if found.pipeline > 1:
        for name in ("tensor", "context", "expert"):
            if getattr(found, name) > 1:
                return f"pipeline with {name} is not built; use pipeline with shard or replicate"
        if section.cpu_offload:
            return "cpu_offload with pipeline is not built; leave one of them out"
        if section.pipeline_schedule in ("interleaved_zero_bubble", "zbv"):
            apart = f"the schedule {section.pipeline_schedule} runs backward twice, for inputs and for weights, and "
            if compile:
                return f"{apart}a compiled layer only once; use interleaved_1f1b, or hardware.compile=false"
            if checkpointing == "selective":
                return f"{apart}selective checkpointing only once; use interleaved_1f1b, or checkpointing none or full"
        if found.context > 1:
            return "pipeline with context is not built; use context with shard, replicate or tensor"
    if found.expert > 1 and max(found.tensor, found.context) > 1:
        return "expert with tensor or context is not built; use expert with shard or replicate"
    return None
