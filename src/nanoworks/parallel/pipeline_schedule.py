"""Pipeline schedules: which there are, what each asks for, how long its ranks will wait, and which one to take.

The schedules are torch's (`torch.distributed.pipelining`); here their order of work is simulated. A rank does its
work in the schedule's order, each piece as soon as what it needs is there; the bubble is the share of all ranks' time
that is spent waiting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import nn
from torch.distributed.pipelining import schedules as engine

from nanoworks.common.errors import UserError
from nanoworks.parallel.pipeline_split import Costs, split


@dataclass(frozen=True)
class Schedule:
    """One way of ordering forward and backward passes of micro-batches over stages."""

    engine: Any
    """torch's class."""
    stages_per_rank: int
    """How many a rank has when nobody says."""
    fixed: bool
    """Whether it must be that number."""
    v_shaped: bool = False
    """The first and the last stage are on the same rank; else stages go round the ranks."""
    splits_backward: bool = False
    """The gradients of weights are computed apart from those of inputs, to fill what would be a bubble."""


SCHEDULES = {
    "gpipe": Schedule(engine.ScheduleGPipe, 1, True),  # https://arxiv.org/abs/1811.06965
    "1f1b": Schedule(engine.Schedule1F1B, 1, True),  # https://arxiv.org/abs/1806.03377
    "interleaved_1f1b": Schedule(engine.ScheduleInterleaved1F1B, 2, False),  # https://arxiv.org/abs/2104.04473
    # https://arxiv.org/abs/2401.10241, both
    "interleaved_zero_bubble": Schedule(engine.ScheduleInterleavedZeroBubble, 2, False, splits_backward=True),
    "zbv": Schedule(engine.ScheduleZBVZeroBubble, 2, True, v_shaped=True, splits_backward=True),
}


class Work(NamedTuple):
    """One pass of a micro-batch through a stage."""

    kind: str
    """ "F" forward, "B" backward, or its parts: "I" for the inputs, "W" for the weights."""
    stage: int
    micro_batch: int


class Bubble(NamedTuple):
    """What a simulation found."""

    seconds: float
    """From the first piece of work to the last, in the unit of the costs."""
    fraction: float
    """Share of all ranks' time spent waiting."""
    in_flight: int
    """Most passes of a micro-batch through a stage whose activations one rank holds at once."""


@dataclass(frozen=True)
class Candidate:
    """One choice that `search` weighed; without `bubble` it was refused, for the `reason`."""

    schedule: str
    stages_per_rank: int
    micro_batches: int
    bubble: Bubble | None = None
    reason: str = ""


def stages_per_rank(schedule: str, asked: int | None) -> int:
    """How many stages each rank has; UserError for a number or a name that there is not."""
    if schedule not in SCHEDULES:
        raise UserError(f"parallel.pipeline_schedule={schedule} is unknown; take one of {', '.join(SCHEDULES)}")
    entry = SCHEDULES[schedule]
    number = entry.stages_per_rank if asked is None else asked
    if (entry.fixed and number != entry.stages_per_rank) or number < 1:
        raise UserError(
            f"the schedule {schedule} has {entry.stages_per_rank} stages a rank, not {number}; leave the number out"
        )
    return number


def rank_of(schedule: str, stage: int, ranks: int) -> int:
    """The rank of a pipeline that holds `stage`."""
    turn, place = divmod(stage, ranks)
    return ranks - 1 - place if SCHEDULES[schedule].v_shaped and turn % 2 else place


def check_micro_batches(schedule: str, ranks: int, micro_batches: int) -> None:
    """UserError when the schedule cannot run a step of so many micro-batches; it names counts that it can."""
    problem = _problem(schedule, ranks, micro_batches)
    if not problem:
        return
    fits = [n for n in range(1, 4 * max(micro_batches, ranks) + 1) if not _problem(schedule, ranks, n)]
    near = sorted(sorted(fits, key=lambda n: abs(n - micro_batches))[:4])
    raise UserError(
        f"a step of {micro_batches} micro-batches does not fit the schedule {schedule} on {ranks} pipeline ranks: "
        f"{problem}. Counts that do: {', '.join(map(str, near))}; change train.tokens_per_step or "
        "train.micro_batch_size"
    )


def _problem(schedule: str, ranks: int, micro_batches: int) -> str:
    if micro_batches < 1:
        return "there is none"
    if schedule == "1f1b" and micro_batches < ranks:
        return f"it needs at least one for each of the {ranks} stages"
    if schedule.startswith("interleaved") and micro_batches % max(1, micro_batches // ranks):
        return f"it runs them in rounds of about {ranks}, all of one size"
    return ""


@lru_cache(maxsize=256)  # torch takes long to order many micro-batches, and a search asks again and again
def order(schedule: str, ranks: int, per_rank: int, micro_batches: int) -> list[list[Work]]:
    """The pieces of work of each rank, in its order."""
    check_micro_batches(schedule, ranks, micro_batches)
    kind = SCHEDULES[schedule].engine
    if issubclass(kind, engine.PipelineScheduleSingle):  # torch runs these without a list of what they do
        ahead = [micro_batches if schedule == "gpipe" else ranks - 1 - rank for rank in range(ranks)]
        return [_one_stage(rank, ahead[rank], micro_batches) for rank in range(ranks)]
    # Only sizes are asked of the stages when the order is made.
    stage: Any = SimpleNamespace(num_stages=ranks * per_rank, group_size=ranks, group_rank=0, submod=nn.Module())
    made = kind([stage] * per_rank, micro_batches).pipeline_order
    return [
        [Work(a.computation_type.value, a.stage_index, a.microbatch_index) for a in made[rank] if a is not None]
        for rank in range(ranks)
    ]


def _one_stage(stage: int, ahead: int, micro_batches: int) -> list[Work]:
    """So many forward passes ahead, then one backward pass for each further one, then the other backward passes."""
    work = [Work("F", stage, i) for i in range(min(ahead, micro_batches))]
    for i in range(micro_batches):
        if i + ahead < micro_batches:
            work.append(Work("F", stage, i + ahead))
        work.append(Work("B", stage, i))
    return work


def simulate(
    schedule: str,
    ranks: int,
    stages: Sequence[float],
    micro_batches: int,
    *,
    backward: float = 2.0,
    head: float = 0.0,
    send: float = 0.0,
) -> Bubble:
    """Run a step on paper.

    Args:
        stages: cost of the forward pass of one micro-batch through each stage.
        backward: cost of a backward pass over that of the forward pass; half of it is for the weights.
        head: how much of the last stage's cost is the head, which runs backward right after its forward pass.
        send: cost of handing an activation or a gradient to another rank.
    """
    work = order(schedule, ranks, len(stages) // ranks, micro_batches)
    last = len(stages) - 1
    cost = {"F": 1.0, "B": backward, "I": backward / 2, "W": backward / 2}
    ends: dict[tuple[str, int, int], float] = {}  # of forward "F", backward for inputs "B", for weights "W"
    place, clock, busy = [0] * ranks, [0.0] * ranks, 0.0
    held, peak = [0] * ranks, 0

    def ready(kind: str, stage: int, batch: int) -> float | None:
        """When what a piece of work needs is there; None while that is unknown."""
        if kind == "F":
            needs = [("F", stage - 1, batch)] if stage else []
        elif kind == "W":
            needs = [("B", stage, batch)]
        else:
            needs = [("F", stage, batch), *([("B", stage + 1, batch)] if stage < last else [])]
        if any(need not in ends for need in needs):
            return None
        here = rank_of(schedule, stage, ranks)
        return max((ends[n] + (send if rank_of(schedule, n[1], ranks) != here else 0.0) for n in needs), default=0.0)

    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(work):
            while place[rank] < len(actions):
                kind, stage, batch = actions[place[rank]]
                begin = ready(kind, stage, batch)
                if begin is None:
                    break
                took = cost[kind] * (stages[stage] - (head if stage == last else 0.0))
                took += head * (1 + backward) if stage == last and kind == "F" else 0.0
                clock[rank] = max(clock[rank], begin) + took
                busy += took
                ends[("B" if kind == "I" else kind, stage, batch)] = clock[rank]
                held[rank] += 1 if kind == "F" else -1 if kind in "BW" else 0
                peak = max(peak, held[rank])
                place[rank] += 1
                moved = True
    assert all(at == len(actions) for at, actions in zip(place, work, strict=True)), "the schedule waits for itself"
    total = max(clock)
    return Bubble(total, 1 - busy / (ranks * total) if total else 0.0, peak)


def search(
    costs: Costs,
    ranks: int,
    rows: int,
    *,
    overhead: float = 0.0,
    send: float = 0.0,
    max_stages_per_rank: int = 4,
    max_rows_in_flight: int | None = None,
) -> list[Candidate]:
    """Weigh schedules, stages a rank and micro-batch counts for a step of `rows` rows; the quickest first.

    Args:
        costs: of one row.
        overhead: what a pass through a stage costs besides, however few the rows (starting kernels, say).
        send: as in `simulate`, for one row.
        max_rows_in_flight: how many rows through all the layers of a rank it has memory for.

    Refused candidates come last, each with the reason.
    """
    found: list[Candidate] = []
    for name, entry in SCHEDULES.items():
        numbers = [entry.stages_per_rank] if entry.fixed else range(entry.stages_per_rank, max_stages_per_rank + 1)
        for per_rank in numbers:
            if ranks * per_rank > len(costs.layers):
                reason = f"{ranks * per_rank} stages, {len(costs.layers)} layers"
                found.append(Candidate(name, per_rank, 0, reason=reason))
                continue
            stages = costs.stages(split(costs, ranks * per_rank))
            for count in (n for n in range(1, rows + 1) if rows % n == 0):
                if problem := _problem(name, ranks, count):
                    found.append(Candidate(name, per_rank, count, reason=problem))
                    continue
                size = rows // count
                passes = [cost * size + overhead for cost in stages]
                bubble = simulate(name, ranks, passes, count, head=costs.head * size, send=send * size)
                held = bubble.in_flight * size / per_rank
                if max_rows_in_flight is not None and held > max_rows_in_flight:
                    reason = f"{held:g} rows in flight, memory for {max_rows_in_flight}"
                    found.append(Candidate(name, per_rank, count, reason=reason))
                else:
                    found.append(Candidate(name, per_rank, count, bubble))
    return sorted(found, key=lambda c: (c.bubble is None, c.bubble.seconds if c.bubble else 0.0))
