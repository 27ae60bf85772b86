"""Ranks the ways of spreading a recipe over devices by what they would take, and says why the others are out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from nanoworks.common.errors import UserError
from nanoworks.config.parallel import ParallelSection
from nanoworks.config.recipe import Checkpointing
from nanoworks.parallel.mesh import ORDER, Degrees
from nanoworks.parallel.support import refusal
from nanoworks.train.plan.cost import Seconds, Traffic, step_seconds
from nanoworks.train.plan.hardware import Cluster
from nanoworks.train.plan.memory import Memory, rank_memory
from nanoworks.train.plan.meshes import meshes, sections
from nanoworks.train.plan.shares import by_stage, cut, of_rank, stages_of_ranks
from nanoworks.train.plan.workload import Workload

if TYPE_CHECKING:
    from nanoworks.parallel.pipeline_schedule import Bubble

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
    checkpointing: Checkpointing
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
        found.append(f"train.micro_batch_size={self.rows}")
        return [*found, f"hardware.activation_checkpointing={self.checkpointing}"]

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
    peak = cluster.peak(work.dtype) / scale
    refused: dict[str, str] = {}
    found: list[Forecast] = []
    choices: tuple[Checkpointing, ...] = ("none", "selective", "full")
    if compiled := work.recipe.hardware.compile:
        choices = ("none", "full")
    for degrees in meshes(work, cluster, refused):
        best, reason = None, "no micro-batch of whole rows"
        for section in sections(work, degrees):
            for checkpointing in choices:
                why = refusal(section, degrees, compile=compiled, checkpointing=checkpointing)
                why = why or _optimizer_refusal(work, degrees)
                if why and not everything:
                    reason = why
                    continue
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


def _optimizer_refusal(work: Workload, degrees: Degrees) -> str | None:
    d = degrees
    cut = d.shard * d.context * d.tensor * d.expert > 1 or (d.pipeline > 1 and d.replicate > 1)
    name = work.recipe.optim.name
    return f"{name} trains whole matrices only; optim.name=muon_adamw does not" if cut and work.whole_matrices else None


def forecast(
    work: Workload,
    cluster: Cluster,
    degrees: Degrees,
    section: ParallelSection,
    *,
    rows: int,
    checkpointing: Checkpointing,
    peak: float | None = None,
) -> Forecast:
    """What one way takes, whether it fits or not.

    Raises:
        UserError: more pipeline stages than layers, or micro-batches that the schedule cannot run.
    """
    peak = cluster.peak(work.dtype) if peak is None else peak
    micro_batches = max(1, work.tokens_per_step // (rows * work.sequence_length * degrees.data))
    ranks = stages_of_ranks(section.pipeline_schedule, degrees.pipeline)
    bounds = cut(work.model, sum(len(stages) for stages in ranks))
    held = by_stage(work.model, degrees, section, bounds)
    seconds, traffic, waits = step_seconds(
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
                of_rank(held, stages),
                max((bounds[stage] for stage in stages), key=len),
                rows=rows,
                in_flight=_in_flight(section.pipeline_schedule, degrees.pipeline, rank, micro_batches, waits),
                checkpointing=checkpointing,
                last=len(bounds) - 1 in stages,
            )
            for rank, stages in enumerate(ranks)
        ),
        key=lambda m: m.total,
    )
    rate = rows * micro_batches * work.sequence_length * degrees.data / seconds.total
    mfu = rate * work.flops_per_token / (cluster.peak(work.dtype) * degrees.world)
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
        0.0 if waits is None else waits.fraction,
        tokens_per_second=rate,
        mfu=mfu,
        hours=hours,
        dollars=dollars,
    )


def _in_flight(schedule: str, ranks: int, rank: int, micro_batches: int, waits: Bubble | None) -> int:
    """Passes of a micro-batch through a stage of which a rank holds activations at once."""
    if waits is None or schedule == "1f1b":
        return min(micro_batches, ranks - rank)
    return waits.in_flight  # of the fullest rank


def _largest(
    work: Workload,
    cluster: Cluster,
    degrees: Degrees,
    section: ParallelSection,
    checkpointing: Checkpointing,
    peak: float,
) -> tuple[Forecast | None, str]:
    """The quickest micro-batch that fits, or None and why there is none."""
    available = cluster.memory()
    total = work.tokens_per_step // work.sequence_length
    each, rest = divmod(total, degrees.data)
    if rest or not each:
        return None, f"{degrees.data} data ranks cannot share a step of {total} rows; change train.tokens_per_step"
    best, reason = None, ""
    for rows in (n for n in range(1, min(each, 4 * work.recipe.train.micro_batch_size) + 1) if each % n == 0):
        try:
            option = forecast(work, cluster, degrees, section, rows=rows, checkpointing=checkpointing, peak=peak)
        except UserError as error:
            reason = reason or str(error)
            continue
        if option.memory.total > available:
            m, how = option.memory, "" if checkpointing == "none" else f" and {checkpointing} checkpointing"
            reason = (
                f"needs {m.total / 2**30:.1f} GiB of {available / 2**30:.1f} with {rows} row{'s' * (rows > 1)} a "
                f"micro-batch{how}: {m.lasting / 2**30:.1f} of parameters, gradients and optimizer, "
                f"{(m.activations + m.margin) / 2**30:.1f} of activations"
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

    def kinds(f: Forecast) -> tuple[int, int, float]:
        d = f.degrees
        used = sum(getattr(d, name) > 1 for name in (*ORDER, "expert"))
        return used, ("none", "selective", "full").index(f.checkpointing), f.seconds.total

    close.sort(key=kinds)
    return close + found[len(close) :]
