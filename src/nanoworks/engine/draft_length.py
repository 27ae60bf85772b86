"""How many tokens to draft: what pays off by measured seconds, down to none.

Verifying more tokens costs more the wider the batch, and a draft costs time itself, so speculation slows small models
down at large batches. For each width of the batch (in powers of two) the time of a step is measured with and without
drafts; over all of them, how many tokens drafts of each length bring. The length of the highest rate

    (sequences + accepted tokens of their drafts) / seconds of the step

is taken, and now and then the one beside it is tried, ever more rarely while it changes nothing, until trials cost one
percent of the time. Sequences differ: each has an average of its own of how often the first drafted token was right.
The luckiest draft, as many of them as the same rate says; what is held against the others is slowly forgotten, so they
get their turn again.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence as ListOf
from dataclasses import dataclass, field
from itertools import accumulate
from statistics import median

from nanoworks.engine.sequence import Sequence

_ENOUGH = 3
"""Measurements before one is believed, and steps of a trial."""
_KEPT = 9
"""Step times that a median is taken of."""
_MEMORY = 0.1
"""Weight of the newest draft in the moving averages."""
_BETTER = 1.03
"""How much faster a longer draft must be to be taken."""
_FIRST_WAIT, _LONGEST_WAIT = 4, 512
"""Steps between trials: the fewest, and the most."""
_TRIALS = 0.01
"""Part of the time that trials may cost; what is cheap to try is tried often."""
_OWN_MEMORY = 0.3
"""Weight of a sequence's newest draft in its own average."""
_FORGIVEN = 0.01
"""How far the average of a sequence that does not draft moves to that of all, in a step."""


@dataclass
class _Width:
    """What is known of steps of about one width."""

    seconds: dict[float, deque[float]] = field(default_factory=dict)
    """The newest step times by drafted tokens a sequence."""
    chosen: int = 0
    interval: int = _FIRST_WAIT
    wait: int = 0
    trial: int | None = None
    left: int = 0
    """Steps of the trial still to come."""
    upward: bool = True
    """Whether the last trial was of a longer draft."""


class DraftLength:
    """Args: `max_draft` tokens at most, 1 or more."""

    def __init__(self, max_draft: int) -> None:
        self.lengths = [0]
        while self.lengths[-1] < max_draft:
            self.lengths.append(min(max(1, 2 * self.lengths[-1]), max_draft))
        # Tokens a sequence that step times are told apart by; below 1 where only some of the sequences draft.
        self._loads = [*(2.0**-i for i in range(6, 0, -1)), *map(float, self.lengths[1:])]
        self._gains = dict.fromkeys(self.lengths, 0.0)  # accepted tokens of a draft of this length
        self._drafts = dict.fromkeys(self.lengths, 0)  # drafts behind each gain
        self._luck = 0.0  # how often the first token of a draft is right
        self._own_luck: dict[Sequence, float] = {}
        self._share = 1.0  # of the sequences that may draft, those for which there is something to draft
        self._widths: dict[int, _Width] = {}
        self._allowed = self._seen = 0  # in the present step

    def limits(self, sequences: ListOf[Sequence]) -> list[int]:
        """Return the most tokens to draft for each of the sequences of the next step."""
        width, own = len(sequences), self._own_luck
        if not width:
            return []
        luck = sorted((own.get(s, self._luck) for s in sequences), reverse=True)
        length, drafting = self._choose(self._width(width), luck)
        least = luck[drafting - 1] if drafting else float("inf")
        limits = [length if own.get(s, self._luck) >= least else 0 for s in sequences]
        for sequence, limit in zip(sequences, limits, strict=True):
            if not limit and sequence in own:
                own[sequence] += _FORGIVEN * (self._luck - own[sequence])
        self._allowed, self._seen = sum(map(bool, limits)), 0
        return limits

    def verified(self, sequence: Sequence, size: int, accepted: ListOf[int]) -> None:
        """Take note of a draft of `size` tokens of which those at the indices `accepted` were right."""
        self._seen += 1
        right = float(len(accepted) > 0)
        mine = self._own_luck.setdefault(sequence, self._luck if self._drafts[1] else right)
        self._own_luck[sequence] += _OWN_MEMORY * (right - mine)
        # The first n tokens of a draft are the draft that a limit of n gives: one draft tells of all shorter ones.
        for at, length in enumerate(self.lengths[1:], start=1):
            if length <= size:
                self._drafts[length] += 1
                weight = max(_MEMORY, 1 / self._drafts[length])
                gain = sum(i < length for i in accepted)
                self._gains[length] += weight * (gain - self._gains[length])
            else:  # a longer draft brings no less than its beginning
                self._gains[length] = max(self._gains[length], self._gains[self.lengths[at - 1]])
        self._luck += max(_MEMORY, 1 / self._drafts[1]) * (right - self._luck)

    def took(self, width: int, drafted: int, seconds: float) -> None:
        """Take note of the time of a step of `width` sequences, one known token each, with `drafted` tokens in all."""
        if self._allowed:
            self._share += _MEMORY * (self._seen / self._allowed - self._share)
        load = 0.0
        if drafted:
            load = min(self._loads, key=lambda load: abs(math.log(load * width / drafted)))
        self._width(width).seconds.setdefault(load, deque(maxlen=_KEPT)).append(seconds)

    def release(self, sequence: Sequence) -> None:
        self._own_luck.pop(sequence, None)

    def _width(self, width: int) -> _Width:
        return self._widths.setdefault(width.bit_length(), _Width())

    def _choose(self, at: _Width, luck: list[float]) -> tuple[int, int]:
        """The length of the next drafts, and how many of the sequences draft; `luck` is theirs, falling."""
        if len(at.seconds.get(0, ())) < _ENOUGH:
            return 0, 0
        if at.left:
            at.left -= 1
            assert at.trial is not None
            return at.trial, len(luck) if at.chosen == 0 else self._rates(at, luck)[at.trial][1]
        rates = self._rates(at, luck)
        known = {n: rate for n, (rate, _) in rates.items() if n == 0 or self._drafts[n] >= _ENOUGH}
        best = max(known, key=lambda n: known[n])
        if known[best] > known.get(at.chosen, 0.0) * (_BETTER if best > at.chosen else 1):
            at.chosen = best
        if at.trial is not None:
            tried = self._rate(_points(at.seconds), at.trial, len(luck), list(accumulate(luck)))
            lost = 1 - tried / rates[at.chosen][0]
            enough = max(_FIRST_WAIT, min(_LONGEST_WAIT, round(_ENOUGH * lost / _TRIALS)))
            at.interval = _FIRST_WAIT if at.trial == at.chosen else min(2 * at.interval, enough)
            at.wait, at.trial = at.interval, None
        at.wait -= 1
        if at.wait >= 0:
            return at.chosen, rates[at.chosen][1]
        at.trial, at.left = self._next_trial(at, len(luck)), _ENOUGH
        return self._choose(at, luck)

    def _rates(self, at: _Width, luck: list[float]) -> dict[int, tuple[float, int]]:
        """By length the expected tokens a second, and how many of the luckiest sequences draft for that."""
        width = len(luck)
        counts = [n for n in (2**i for i in range(width.bit_length())) if n < width] + [width]
        lucks = list(accumulate(luck))
        points = _points(at.seconds)
        rates = {0: (self._rate(points, 0, 0, lucks), 0)}
        for length in self.lengths[1:]:
            rates[length] = max((self._rate(points, length, n, lucks), n) for n in counts)
        return rates

    def _rate(self, points: list[tuple[float, float]], length: int, drafting: int, lucks: list[float]) -> float:
        """Expected tokens a second when the first `drafting` sequences draft; `lucks` sums up their luck."""
        width, drafts = len(lucks), self._share * drafting
        gain = 0.0
        if drafting and self._luck:  # a sequence gains in proportion to its luck, and never more than it drafts
            gain = min(self._gains[length] / self._luck * lucks[drafting - 1] * self._share, drafts * length)
        return (width + gain) / _seconds(points, drafts * length / width)

    def _next_trial(self, at: _Width, width: int) -> int:
        place = self.lengths.index(at.chosen)
        if at.chosen == 0:
            # The first time look farther at once, which tells of all shorter drafts, unless that would cost much.
            first = len(at.seconds) == 1 and width <= 4
            return self.lengths[-(-len(self.lengths) // 2)] if first else self.lengths[1]
        at.upward = place + 1 < len(self.lengths) and not at.upward
        return self.lengths[place + 1 if at.upward else place - 1]


def _points(measured: dict[float, deque[float]]) -> list[tuple[float, float]]:
    """Drafted tokens a sequence and the median time of a step with them, rising."""
    return [(n, median(times)) for n, times in sorted(measured.items()) if n == 0 or len(times) >= _ENOUGH]


def _seconds(points: list[tuple[float, float]], drafted: float) -> float:
    """Time of a step with `drafted` tokens a sequence: on straight lines between `points`, never less than without
    drafts; infinite where only the step without drafts was measured."""
    if drafted == 0:
        return points[0][1]
    if len(points) == 1:
        return float("inf")
    after = next((i for i, (n, _) in enumerate(points) if n >= drafted), len(points) - 1)
    (x0, y0), (x1, y1) = points[after - 1], points[after]
    return max(points[0][1], y0 + (y1 - y0) * (drafted - x0) / (x1 - x0))
