"""What the clients of a run felt: rates and percentiles."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from nanoworks.serve.bench.run import Run

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Spread:
    """Of times in seconds; `percentiles` as in PERCENTILES."""

    mean: float
    percentiles: tuple[float, ...]
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """None when there are no values."""
        found = np.fromiter(values, float)
        if not len(found):
            return None
        return cls(float(found.mean()), tuple(map(float, np.percentile(found, PERCENTILES))), float(found.max()))


@dataclass(frozen=True)
class Summary:
    """Failed requests count in `failed` and `errors` only."""

    seconds: float
    answered: int
    failed: int
    errors: dict[str, int]
    """How often each message came."""
    prompt_tokens: int
    completion_tokens: int
    requests_per_second: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    first_token: Spread | None
    """TTFT: from sending a request to the first piece of its answer."""
    between_tokens: Spread | None
    """ITL: from one piece of an answer to the next, all answers' together."""
    per_token: Spread | None
    """TPOT: of each answer, its time after the first piece by its tokens after the first."""
    whole: Spread | None
    """From sending a request to the end of its answer."""


def summarize(run: Run) -> Summary:
    good = [outcome for outcome in run.outcomes if not outcome.error]
    errors: dict[str, int] = {}
    for outcome in run.outcomes:
        if outcome.error:
            errors[outcome.error] = errors.get(outcome.error, 0) + 1
    prompt, completion = sum(o.prompt_tokens for o in good), sum(o.completion_tokens for o in good)
    return Summary(
        seconds=run.seconds,
        answered=len(good),
        failed=len(run.outcomes) - len(good),
        errors=errors,
        prompt_tokens=prompt,
        completion_tokens=completion,
        requests_per_second=len(good) / run.seconds,
        output_tokens_per_second=completion / run.seconds,
        total_tokens_per_second=(prompt + completion) / run.seconds,
        first_token=Spread.of(o.first for o in good if o.first is not None),
        between_tokens=Spread.of(gap for o in good for gap in o.gaps),
        per_token=Spread.of(
            (o.pieces[-1] - o.pieces[0]) / (o.completion_tokens - 1)
            for o in good
            if len(o.pieces) > 1 and o.completion_tokens > 1
        ),
        whole=Spread.of(o.duration for o in good),
    )
