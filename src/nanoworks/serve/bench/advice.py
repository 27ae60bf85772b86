"""What held a server up while it was under load, and which of its knobs to turn: read off its own metrics.

Requests lose time in two places: they wait until the engine lets them in, and then in the engine's steps. The engine
makes them wait for one of three reasons: all seats are taken (`max_num_seqs`), the KV cache has no room, or its steps
are full of other prompts. So: do they wait, and if so, what was used up while they did?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Literal

from nanoworks.serve.bench.scrape import Snapshot

Bound = Literal["queue", "kv", "compute", "none", "unknown"]

WAITS = 0.2
"""The share of requests' time from which waiting is what holds the server up."""
KV_FULL = 0.8
"""Full enough to make requests wait: a newcomer's whole prompt must fit, and a block for the growth of every other."""
PREEMPTED = 0.05
"""Preemptions a request from which they are the matter, whether or not anybody waits."""
IDLE = 0.5
"""The share of moments with no request in the engine from which the load was light."""


@dataclass(frozen=True)
class Advice:
    bound: Bound
    headline: str
    evidence: tuple[str, ...]
    knobs: tuple[str, ...]
    """What to try, the best first."""


@dataclass(frozen=True)
class Pressure:
    """A run in a few numbers; shares from 0 to 1."""

    queue: float
    """Of the time of requests that they waited, and below that they spent in reading prompts and in writing."""
    prefill: float
    decode: float
    idle: float
    """Of the moments seen, those with nothing in the engine."""
    running: float
    """Mean in the moments that count: those with somebody waiting, else those with somebody running."""
    waiting: float
    kv: float
    seats: float | None
    """The engine's max_num_seqs; None when the server does not say."""
    step_fill: float | None
    """Tokens in a step by the most it takes."""
    preemptions: float
    """For each answer."""

    @classmethod
    def of(cls, snapshots: Sequence[Snapshot]) -> Pressure | None:
        """None when there is too little to go by: the first and the last are of before and after the load."""
        if len(snapshots) < 3:
            return None
        first, last = snapshots[0], snapshots[-1]

        def grew(name: str) -> float:
            return max(0.0, last.get(name) - first.get(name))

        parts = [grew(f"request_{part}_time_seconds_sum") for part in ("queue", "prefill", "decode")]
        answers = grew("request_success_total")
        if not answers or not sum(parts):
            return None
        queue, prefill, decode = (part / sum(parts) for part in parts)
        moments = snapshots[1:-1]
        busy = [s for s in moments if s.get("num_requests_running")]
        seen = [s for s in busy if s.get("num_requests_waiting")] or busy or moments
        steps, most = grew("engine_steps_total"), last.get("max_batch_tokens")
        return cls(
            queue=queue,
            prefill=prefill,
            decode=decode,
            idle=1 - len(busy) / len(moments),
            running=mean(s.get("num_requests_running") for s in seen),
            waiting=mean(s.get("num_requests_waiting") for s in seen),
            kv=mean(s.get("kv_cache_usage_perc") for s in seen),
            seats=last.values.get("max_num_seqs"),
            step_fill=grew("engine_tokens_computed_total") / steps / most if steps and most else None,
            preemptions=grew("num_preemptions_total") / answers,
        )


def advise(snapshots: Sequence[Snapshot]) -> Advice:
    """Say what held the server up between the first and the last of `snapshots`."""
    pressure = Pressure.of(snapshots)
    if pressure is None:
        return Advice(
            "unknown",
            "The server's metrics say too little: is there a /metrics, and did the run last a few of its readings?",
            (),
            ("run longer (--requests), or give the key of an admin, which /metrics asks for (--api-key)",),
        )
    evidence = _evidence(pressure)
    waits = pressure.queue >= WAITS and pressure.waiting > 0
    seated = pressure.seats is None or pressure.running >= 0.9 * pressure.seats
    full = pressure.kv >= KV_FULL or (not seated and pressure.kv >= KV_FULL / 2 and (pressure.step_fill or 0) < 0.5)
    if pressure.preemptions >= PREEMPTED or (waits and full):
        return Advice(
            "kv",
            "KV-bound: the KV cache has no room for more requests.",
            evidence,
            (
                "--kv-memory: more GiB for the cache",
                "--kv-dtype int8: nearly twice the tokens in the same memory",
                "--quantize int8: the weights leave room for the cache",
                f"--max-num-seqs {max(1, int(pressure.running * 0.8))}: where requests are preempted, "
                "fewer at a time lose less",
                "another replica",
            ),
        )
    if waits and seated:
        return Advice(
            "queue",
            f"Queue-bound: all {pressure.running:.0f} places are taken while the KV cache has room.",
            evidence,
            (
                f"--max-num-seqs {2 * max(1, round(pressure.running))}: more answers at a time; tokens of each come a "
                "little later",
                "another replica, once this gains nothing more",
            ),
        )
    if pressure.idle >= IDLE and not waits:
        return Advice(
            "none",
            "Nothing holds it up: most of the time the server had nothing to do.",
            evidence,
            ("a higher --rate or --concurrency finds out how much it can do",),
        )
    if pressure.prefill > pressure.decode or (waits and not seated):
        return Advice(
            "compute",
            "Compute-bound: most of the work is reading prompts.",
            evidence,
            (
                "prompts that begin alike (instructions first, what differs last) are read once",
                "--quantize int8",
                "a faster device, --tensor-parallel, or another replica",
            ),
        )
    return Advice(
        "compute",
        "Compute-bound: the model's own steps are what takes the time.",
        evidence,
        (
            "--quantize int8 or int4",
            "--speculate ngram: pays for answers that repeat their prompt, and for few requests at a time",
            "a faster device, --tensor-parallel, or another replica",
        ),
    )


def _evidence(pressure: Pressure) -> tuple[str, ...]:
    seats = "" if pressure.seats is None else f" of {pressure.seats:.0f} places"
    lines = [
        f"time of requests: {pressure.queue:.0%} waiting, {pressure.prefill:.0%} reading prompts, "
        f"{pressure.decode:.0%} writing answers",
        f"in the engine: {pressure.running:.1f}{seats} running, {pressure.waiting:.1f} waiting; "
        f"KV cache {pressure.kv:.0%} full",
    ]
    if pressure.step_fill is not None:
        lines.append(f"steps: {pressure.step_fill:.0%} full of tokens")
    if pressure.preemptions:
        lines.append(f"preemptions: {pressure.preemptions:.2f} for each answer")
    if pressure.idle:
        lines.append(f"idle: {pressure.idle:.0%} of the time")
    return tuple(lines)
