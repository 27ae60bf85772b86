"""Learning-rate schedules: a multiplier of every learning rate as a function of the step.

A schedule is called with (step, total_steps), where step counts from 0 and `total_steps` is the length of the
run, and knows nothing else, so a resumed run needs no schedule state. All of them share a linear warmup.
"""

from __future__ import annotations

import math

from pydantic import Field

from nanoworks.common.registry import Registry
from nanoworks.config.base import Frozen

SCHEDULES: Registry[type[Schedule]] = Registry(
    "schedule", dict.fromkeys(("constant", "linear", "cosine", "trapezoid"), "nanoworks.train.schedule")
)


class Schedule:
    """Warmup, then `after_warmup`. Subclasses say what follows the warmup."""

    class Options(Frozen):
        warmup_ratio: float = Field(
            default=0.0, ge=0, le=1, description="share of the run over which the multiplier rises to 1"
        )
        warmup_steps: int = Field(default=0, ge=0, description="the same in steps; the longer of the two counts")

    def __init__(self, options: Options) -> None:
        self.options = options

    def __call__(self, step: int, total_steps: int) -> float:
        warmup = max(self.options.warmup_steps, round(self.options.warmup_ratio * total_steps))
        if step < warmup:
            return (step + 1) / warmup
        return self.after_warmup(step, warmup, total_steps)

    def after_warmup(self, step: int, warmup: int, total_steps: int) -> float:
        raise NotImplementedError


@SCHEDULES.register("constant")
class Constant(Schedule):
    """1 after the warmup."""

    def after_warmup(self, step: int, warmup: int, total_steps: int) -> float:
        return 1.0


class _Decaying(Schedule):
    class Options(Schedule.Options):
        final_lr_fraction: float = Field(default=0.0, ge=0, le=1, description="multiplier at the end of the run")

    options: Options

    def after_warmup(self, step: int, warmup: int, total_steps: int) -> float:
        left = self.left(step, warmup, total_steps)
        return left + (1 - left) * self.options.final_lr_fraction

    def left(self, step: int, warmup: int, total_steps: int) -> float:
        """Return 1 where the decay begins, 0 at `total_steps`."""
        raise NotImplementedError


@SCHEDULES.register("linear")
class Linear(_Decaying):
    """A straight line from 1 at the end of the warmup to `final_lr_fraction` (nanochat's SFT and RL)."""

    def left(self, step: int, warmup: int, total_steps: int) -> float:
        return (total_steps - step) / max(1, total_steps - warmup)


@SCHEDULES.register("cosine")
class Cosine(_Decaying):
    """Half a cosine from 1 at the end of the warmup to `final_lr_fraction` (https://arxiv.org/abs/1608.03983)."""

    def left(self, step: int, warmup: int, total_steps: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))


@SCHEDULES.register("trapezoid")
class Trapezoid(_Decaying):
    """1, then a straight line to `final_lr_fraction` over the last `warmdown_ratio` of the run.

    nanochat's pretraining; with the default ratio of 0.2 also its midtraining (1 until 80%, then down to 0).
    """

    class Options(_Decaying.Options):
        warmdown_ratio: float = Field(default=0.2, ge=0, le=1, description="share of the run that decays")

    options: Options

    def left(self, step: int, warmup: int, total_steps: int) -> float:
        warmdown = round(self.options.warmdown_ratio * total_steps)
        return min(1.0, (total_steps - step) / max(1, warmdown))


def rise(start: float, end: float, steps: int, step: int) -> float:
    """Go in a straight line from `start` at step 0 to `end` at `steps` and stay there (Muon's momentum)."""
    share = min(step / steps, 1.0) if steps else 1.0
    return (1 - share) * start + share * end
