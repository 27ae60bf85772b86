"""The figures of a report: what report.json holds, and all that report.md and report.html may show.

Every rendering is made from these objects, so the three files cannot disagree. A figure that is not known is
null. Units: seconds, tokens, GiB (2**30 bytes); `mfu` and accuracies are fractions.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from nanoworks.config.base import Frozen


class Series(Frozen):
    """One metric over the steps, thinned to what a plot can show; the extremes of each stretch are kept."""

    steps: list[int]
    values: list[float]
    smooth: list[float]
    """Running mean of all logged values (not only of those kept here) at the same steps."""


class Trend(Frozen):
    """A metric from start to end, taken from every logged value."""

    first: float
    last: float
    best: float
    best_step: int


class Evaluation(Frozen):
    """One task scored on one checkpoint."""

    task: str
    kind: str | None = None
    metric: str
    value: float | None
    """Null where the task failed; `error` then says why."""
    stderr: float | None = None
    n: int | None = None
    failed: int = 0
    """Examples that could not be run; they count as wrong."""
    baseline: float | None = None
    """What guessing gives."""
    error: str | None = None
    step: int
    settings: dict[str, Any] = Field(default_factory=dict)


class Sample(Frozen):
    step: int
    prompt: str
    completion: str


class ExpertUse(Frozen):
    """How a mixture of experts used them at the end of what was logged: the mean of the last recorded steps."""

    first_step: int
    last_step: int
    layers: list[int]
    shares: list[list[float]]
    """For each of `layers` the part of the choices that each expert had; even is 1 / experts."""


class Stage(Frozen):
    """One run directory: a stage of training."""

    path: str
    id: str | None
    name: str
    stage: str
    status: str
    """`finished`, `running` or `stopped`, as run.json says; `unknown` where it does not."""
    parent: str | None
    created: float | None
    """Unix seconds."""
    environment: dict[str, Any]
    model: dict[str, Any]
    tokenizer: dict[str, Any]
    config: dict[str, Any]

    steps: int
    """Steps taken."""
    total_steps: int | None
    """Steps planned."""
    tokens: int | None
    """Supervised tokens trained on."""
    train_seconds: float | None
    """Time inside training steps."""
    elapsed_seconds: float | None
    """From the creation of the run to its last record: with evaluations, saves and pauses."""
    tokens_per_second: float | None
    """Median over the steps."""
    mfu: float | None
    """Median over the steps."""
    memory_gib: float | None
    """Peak."""
    predicted_tokens_per_second: float | None = None
    """By the planner, before the run; so is `predicted_memory_gib`, of the fullest rank."""
    predicted_memory_gib: float | None = None
    loss: Trend | None
    val_loss: Trend | None
    val_bpb: Trend | None
    reward: Trend | None

    experts: ExpertUse | None = None
    series: dict[str, Series]
    evals: list[Evaluation]
    samples: list[Sample]
    notes: list[str]
    """What is missing or odd, in words."""

    def latest_evals(self) -> dict[str, Evaluation]:
        """The evaluation of each task at the highest step it was scored on."""
        return {evaluation.task: evaluation for evaluation in sorted(self.evals, key=lambda e: e.step)}


class Report(Frozen):
    """One run with all it was made from, or a folder of runs: stages in the order they were trained."""

    title: str
    directory: str
    """The run or the folder the report is about."""
    stages: list[Stage]
    total_seconds: float | None
    notes: list[str]


class ConfigDifference(Frozen):
    key: str
    values: list[Any]
    """One for each run; null where the run's recipe has no such key."""


class FigureComparison(Frozen):
    """One figure of several runs, the first of which is the baseline."""

    name: str
    values: list[float | None]
    changes: list[float | None]
    """Relative to the baseline (0.1: a tenth more); null for the baseline and where it cannot be said."""


class ScoreComparison(Frozen):
    """One task's score in several runs, the first of which is the baseline."""

    task: str
    metric: str
    values: list[float | None]
    stderrs: list[float | None]
    deltas: list[float | None]
    """Difference from the baseline; null for the baseline and where either has none."""
    verdicts: list[str | None]
    """`better`, `worse`, `no clear difference` or `same`; null where no standard error can say."""


class Comparison(Frozen):
    title: str
    runs: list[Stage]
    config: list[ConfigDifference]
    figures: list[FigureComparison]
    scores: list[ScoreComparison]
    notes: list[str]
