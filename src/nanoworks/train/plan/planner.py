"""Ranks the ways of spreading a recipe over devices by what they would take, and says why the others are out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from nanoworks.common.errors import UserError
from nanoworks.config.parallel import ParallelSection
from nanoworks.models import Decoder
from nanoworks.nn.head import Head
from nanoworks.parallel.mesh import ORDER, Degrees
from nanoworks.parallel.native import refusal
from nanoworks.parallel.pipeline_split import split
from nanoworks.train.plan.cost import Seconds, Traffic, step_seconds
from nanoworks.train.plan.hardware import Cluster
from nanoworks.train.plan.memory import Memory, rank_memory
from nanoworks.train.plan.meshes import meshes
from nanoworks.train.plan.shares import of_stage, parts
from nanoworks.train.plan.workload import Workload

SAME = 0.02
"""Times closer than this count as equal; then what is simpler comes first."""


@dataclass(frozen=True)
class Forecast:
    """One way to run a recipe, and what it would take."""

    degrees: Degrees
    section: ParallelSection
    rows: int
    """Of a micro-batch."""
    micro_batches: int
    checkpointing: bool
    memory: Memory
    """Of the fullest rank."""
    seconds: Seconds
    """Of a step."""
    traffic: Traffic
    bubble: float
    tokens_per_second: float
    mfu: float
    hours: float | None
    """Of the whole run; None where its length is not known. So is `dollars`."""
    dollars: float | None

    @property
    def name(self) -> str:
        """What people call it."""
        d = self.degrees
        parts = []
        if d.pipeline > 1:
            parts.append(f"PP {d.pipeline}")
        if d.tensor > 1:
            parts.append(f"TP {d.tensor}")
        if d.context > 1:
            parts.append(f"CP {d.context}")
        if d.expert > 1:
            parts.append(f"EP {d.expert}")
        if d.shard > 1:
            parts.append(f"HSDP {d.replicate}x{d.shard}" if d.replicate > 1 else f"FSDP2 {d.shard}")
        elif d.replicate > 1:
            parts.append(f"DDP {d.replicate}")
        return " x ".join(parts) or "one device"

    @property
    def overrides(self) -> list[str]:
        """What to add to `nanoworks train RECIPE` to run it so."""
        s = self.section
        found = [f"parallel.{name}={getattr(self.degrees, name)}" for name in (*ORDER, "expert")]
        found = [text for text in found if not text.endswith("=1") or text.startswith("parallel.shard")]
        default = ParallelSection()
        found += [
            f"parallel.{key}={str(getattr(s, key)).lower()}"
            for key in ("sequence_parallel", "loss_parallel", "reshard_after_forward", "pipeline_schedule")
            if getattr(s, key) != getattr(default, key)
        ]
        checkpointing = str(self.checkpointing).lower()
        return [*found, f"train.micro_batch_size={self.rows}", f"hardware.activation_checkpointing={checkpointing}"]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: bytes, seconds, tokens/s."""
        return {
            "name": self.name,
            "degrees": asdict(self.degrees),
            "micro_batch_size": self.rows,
            "micro_batches": self.micro_batches,
            "activation_checkpointing": self.checkpointing,
            "overrides": self.overrides,
            "memory": {**asdict(self.memory), "total": self.memory.total},
            "seconds": {**asdict(self.seconds), "total": self.seconds.total},
            "traffic": {**asdict(self.traffic), "total": self.traffic.total},
            "bubble": self.bubble,
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "hours": self.hours,
            "dollars": self.dollars,
        }


@dataclass(frozen=True)
class Refusal:
    what: str
    reason: str


@dataclass(frozen=True)
class Planned:
    """All that fit, the quickest first, and what does not."""

    work: Workload
    cluster: Cluster
    forecasts: list[Forecast]
    refused: list[Refusal]

    def best(self) -> Forecast:
        """Raises UserError, with the reasons, when nothing fits."""
        if self.forecasts:
            return self.forecasts[0]
        reasons = "\n".join(f"  {r.what}: {r.reason}" for r in self.refused)
        raise UserError(f"no way to train this on {self.cluster} was found:\n{reasons}")


def plan(work: Workload, cluster: Cluster, *, scale: float = 1.0, everything: bool = False) -> Planned:
    """Weigh every mesh of the cluster's devices, each with the micro-batch and checkpointing that suit it best.

    Args:
        scale: seconds that arithmetic took over what was predicted (`plan.measure`).
        everything: also what the native strategy refuses to run.
    """
    peak = cluster.hardware.peak(work.dtype) / scale
    refused: dict[str, str] = {}
    found: list[Forecast] = []
    for degrees in meshes(work, cluster, refused):
        best, reason = None, "no micro-batch of whole rows"
        for section in _sections(work, degrees):
            if not everything and (why := refusal(section, degrees)):
                reason = why
                continue
            for checkpointing in (False, True):
                option, why = _largest(work, cluster, degrees, section, checkpointing, peak)
                if option is None:
                    reason = why or reason
                elif best is None or option.seconds.total < best.seconds.total * (1 - SAME):
                    best = option
        if best is None:
            refused[str(degrees) or "one device"] = reason
        else:
            found.append(best)
    found.sort(key=lambda f: f.seconds.total)
    return Planned(work, cluster, _simplest_first(found), [Refusal(k, v) for k, v in refused.items()])


def forecast(
    work: Workload,
    cluster: Cluster,
    degrees: Degrees,
    section: ParallelSection,
    *,
    rows: int,
    checkpointing: bool,
    peak: float | None = None,
) -> Forecast:
    """What one way takes, whether it fits or not.

    Raises:
        UserError: more pipeline stages than layers, or micro-batches that the schedule cannot run.
    """
    peak = cluster.hardware.peak(work.dtype) if peak is None else peak
    micro_batches = max(1, work.tokens_per_step // (rows * work.sequence_length * degrees.data))
    per_rank = 1
    if degrees.pipeline > 1:
        from nanoworks.parallel.pipeline_schedule import stages_per_rank

        per_rank = stages_per_rank(section.pipeline_schedule, None)
    bounds = split(work.costs, degrees.pipeline * per_rank)
    everything, ends = parts(work.model, degrees, section), len(bounds) - 1
    held = [list(of_stage(everything, b, first=i == 0, last=i == ends)) for i, b in enumerate(bounds)]
    seconds, traffic, bubble = step_seconds(
        work,
        cluster,
        degrees,
        section,
        held,
        bounds,
        rows=rows,
        micro_batches=micro_batches,
        checkpointing=checkpointing,
        peak=peak,
    )
    memory = max(
        (
            rank_memory(
                work,
                degrees,
                section,
                [p for stage in held[i :: degrees.pipeline] for p in stage],
                bounds[i],
                rows=rows,
                in_flight=_in_flight(section.pipeline_schedule, degrees.pipeline, i, micro_batches) * per_rank,
                checkpointing=checkpointing,
                last=i == degrees.pipeline - 1,
            )
            for i in range(degrees.pipeline)
        ),
        key=lambda m: m.total,
    )
    rate = rows * micro_batches * work.sequence_length * degrees.data / seconds.total
    mfu = rate * work.flops_per_token / (cluster.hardware.peak(work.dtype) * degrees.world)
    hours = None if work.tokens is None else work.tokens / rate / 3600
    dollars = None if hours is None else hours * degrees.world * cluster.hardware.dollars_per_hour
    return Forecast(
        degrees,
        section,
        rows,
        micro_batches,
        checkpointing,
        memory,
        seconds,
        traffic,
        bubble,
        tokens_per_second=rate,
        mfu=mfu,
        hours=hours,
        dollars=dollars,
    )


def _in_flight(schedule: str, ranks: int, stage: int, micro_batches: int) -> int:
    """Micro-batches of which a rank holds activations at once."""
    return micro_batches if schedule == "gpipe" else min(micro_batches, ranks - stage)


def _sections(work: Workload, degrees: Degrees) -> Iterator[ParallelSection]:
    """The recipe's choices, with those that follow from the degrees."""
    asked = work.recipe.parallel
    values: dict[str, Any] = {**asked.model_dump(), "strategy": "native", "deepspeed": {}}
    values |= {name: getattr(degrees, name) for name in (*ORDER, "expert")}
    model = work.model
    values["sequence_parallel"] = degrees.tensor > 1 and type(model).forward is Decoder.forward
    whole = model.config.vocab_size % degrees.tensor == 0
    values["loss_parallel"] = degrees.tensor > 1 and whole and type(model.head) is Head
    for reshard in (False, True) if degrees.shard * degrees.context > 1 else (True,):
        yield ParallelSection(**{**values, "reshard_after_forward": reshard})


def _largest(
    work: Workload,
    cluster: Cluster,
    degrees: Degrees,
    section: ParallelSection,
    checkpointing: bool,
    peak: float,
) -> tuple[Forecast | None, str]:
    """The quickest micro-batch that fits, or None and why there is none."""
    available = cluster.hardware.memory()
    each = work.tokens_per_step // (work.sequence_length * degrees.data)
    if each < 1:
        rows = work.tokens_per_step // work.sequence_length
        reason = f"a step of {rows} rows has none for some of {degrees.data} data ranks; raise train.tokens_per_step"
        return None, reason
    best, reason = None, ""
    for rows in (n for n in range(1, min(each, 4 * work.recipe.train.micro_batch_size) + 1) if each % n == 0):
        try:
            option = forecast(work, cluster, degrees, section, rows=rows, checkpointing=checkpointing, peak=peak)
        except UserError as error:
            reason = reason or str(error)
            continue
        if option.memory.total > available:
            m = option.memory
            reason = (
                f"needs {m.total / 2**30:.1f} GiB of {available / 2**30:.1f} with {rows} row{'s' * (rows > 1)} a "
                f"micro-batch{' and checkpointing' if checkpointing else ''}: {m.lasting / 2**30:.1f} of parameters, "
                f"gradients and optimizer, {(m.activations + m.margin) / 2**30:.1f} of activations"
            )
            break
        if best is None or option.seconds.total < best.seconds.total * (1 - SAME / 4):
            best = option
    return best, reason


def _simplest_first(found: list[Forecast]) -> list[Forecast]:
    """Among those as quick as the quickest, the one with the fewest kinds of parallelism leads."""
    if not found:
        return found
    close = [f for f in found if f.seconds.total <= found[0].seconds.total * (1 + SAME)]

    def kinds(f: Forecast) -> tuple[int, bool, float]:
        d = f.degrees
        used = sum(getattr(d, name) > 1 for name in (*ORDER, "expert"))
        return used, f.checkpointing, f.seconds.total

    close.sort(key=kinds)
    return close + found[len(close) :]
