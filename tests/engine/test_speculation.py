"""The walk over verified drafts, and how much is drafted under simulated costs."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from nanoworks.engine import Request
from nanoworks.engine.draft_length import DraftLength
from nanoworks.engine.proposers import chain
from nanoworks.engine.sequence import Draft, Sequence
from nanoworks.engine.speculation import Speculator, Verified, accept, accept_typical

CHAIN = Draft([5, 6, 7], [-1, 0, 1])
TREE = Draft([5, 9, 6, 8, 6, 3], [-1, -1, 0, 0, 1, 4])
"""5 or 9; after 5: 6 or 8; after 9: 6, then 3."""


@pytest.mark.parametrize(
    ("draft", "root", "after", "expected"),
    [
        (CHAIN, 5, [6, 7, 8], ([0, 1, 2], 8)),
        (CHAIN, 5, [6, 1, 8], ([0, 1], 1)),
        (CHAIN, 4, [6, 7, 8], ([], 4)),
        (TREE, 9, [0, 6, 0, 0, 3, 2], ([1, 4, 5], 2)),
        (TREE, 5, [8, 6, 0, 4, 0, 0], ([0, 3], 4)),
        (TREE, 5, [1, 6, 0, 4, 0, 0], ([0], 1)),
        (Draft([], []), 3, [], ([], 3)),
    ],
)
def test_walk(draft: Draft, root: int, after: list[int], expected: tuple[list[int], int]) -> None:
    assert accept(draft, root, after) == expected


def test_sampled_output_keeps_its_distribution() -> None:
    """Two tokens from a known chain, drafted by a fixed wrong-or-right guess: a chi-square test of 4 outcomes."""
    first, second = torch.tensor([0.7, 0.3]), torch.tensor([[0.2, 0.8], [0.6, 0.4]])
    rng = random.Random(0)
    counts = torch.zeros(2, 2)
    trials = 4000
    for _ in range(trials):
        draft = Draft([0, 1], [-1, -1])  # both children
        draw = lambda p: int(rng.random() >= float(p[0]))  # noqa: E731
        accepted, token = accept(draft, draw(first), [draw(second[0]), draw(second[1])])
        counts[draft.tokens[accepted[0]], token] += 1
    expected = first[:, None] * second * trials
    assert float(((counts - expected) ** 2 / expected).sum()) < 16.3  # 3 degrees of freedom, p = 0.001


def test_typical_acceptance_takes_the_longest_likely_path() -> None:
    logits = torch.full((7, 10), -20.0)
    logits[0, [5, 9]] = 0.0  # both are as likely as can be
    logits[1, 8] = 0.0  # after 5 (row 1): 8 surely
    logits[2, 6] = 0.0  # after 9 (row 2): 6 surely
    logits[5, 3] = 0.0
    assert accept_typical(TREE, logits, [0, 1, 2, 3, 4, 5, 6]) == ([1, 4, 5], 6)
    logits[2] = torch.zeros(10)
    logits[2, 6] = -20.0  # now 6 is the one token that is not likely there
    assert accept_typical(TREE, logits, [0, 1, 2, 3, 4, 5, 6]) == ([0, 3], 4)
    logits[0] = -20.0
    logits[0, 1] = 0.0
    assert accept_typical(TREE, logits, [0, 1, 2, 3, 4, 5, 6]) == ([], 0)


# -------------------------------------------------------------------------------------------- how much to draft


def sequence() -> Sequence:
    return Sequence(Request([1, 2, 3]), 0, max_tokens=10**9, stop_ids=frozenset(), seed=0, text=None, tool=None)


class Simulation:
    """A proposer whose tokens are right with the probability `right(sequence index, step)`, one after the other, and a
    clock that advances by `seconds(width, drafted)` a step."""

    needs_hidden = False

    def __init__(
        self, width: int, right: Callable[[int, int], float], seconds: Callable[[int, int], float], max_draft: int = 8
    ) -> None:
        self.sequences = [sequence() for _ in range(width)]
        self.right, self.seconds = right, seconds
        self.now, self.tokens, self.step = 0.0, 0, 0
        self.lengths: list[list[int]] = []
        self.rng = random.Random(3)
        self.speculator = Speculator(self, max_draft=max_draft, clock=lambda: self.now)

    def propose(self, sequences: list[Sequence], limits: list[int]) -> list[Draft | None]:
        return [chain([0] * limit) for limit in limits]

    def release(self, sequence: Sequence) -> None:
        pass

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.speculator.before(self.sequences)
            verified = []
            for i, s in enumerate(self.sequences):
                size = len(s.draft) if s.draft else 0
                p = self.right(i, self.step)
                verified.append(Verified(s, s.draft, [int(self.rng.random() >= p) for _ in range(size + 1)]))
            self.lengths.append([len(v.draft) if v.draft else 0 for v in verified])
            self.now += self.seconds(len(self.sequences), sum(self.lengths[-1]))
            outcomes = self.speculator.after(verified, known=len(verified))
            self.tokens += sum(len(accepted) + 1 for accepted, _ in outcomes)
            self.step += 1

    def mean_length(self, last: int) -> float:
        tail = self.lengths[-last:]
        return sum(map(sum, tail)) / (last * len(self.sequences))

    @property
    def gain(self) -> float:
        """Tokens a second over those of plain decoding."""
        width = len(self.sequences)
        return self.tokens / self.now * self.seconds(width, 0) / width


def free(width: int, drafted: int) -> float:
    """Verification at batch 1 on a CPU: nearly nothing for a few tokens more."""
    return 0.01 + 0.0002 * drafted


def test_copying_drafts_as_much_as_it_may() -> None:
    simulation = Simulation(1, lambda i, step: 0.97, free)
    simulation.run(200)
    assert simulation.mean_length(100) > 7
    assert simulation.gain > 4


def test_a_draft_that_slows_down_is_given_up() -> None:
    """A known case: the draft is accepted half of the time, and the step takes so much longer that it loses 30%."""
    simulation = Simulation(16, lambda i, step: 0.5, lambda w, d: 0.01 + (0.0115 if d else 0) + 0.001 * d / w)
    simulation.run(600)
    assert simulation.mean_length(300) < 0.2
    assert simulation.gain > 0.93
    forced = Simulation(16, lambda i, step: 0.5, simulation.seconds)
    forced.speculator.length.limits = lambda s: [2] * len(s)  # type: ignore[method-assign]
    forced.run(200)
    assert forced.gain < 0.8


def test_random_text_costs_next_to_nothing() -> None:
    simulation = Simulation(1, lambda i, step: 0.01, free)
    simulation.run(500)
    assert simulation.gain > 0.97
    assert simulation.mean_length(250) < 0.5


def test_a_middling_acceptance_takes_a_middling_length() -> None:
    """p = 0.6 and 4% a token: the best fixed length is about 4."""
    cost = lambda w, d: 0.01 * (1 + 0.1 * d)  # noqa: E731
    simulation = Simulation(1, lambda i, step: 0.6, cost)
    simulation.run(1500)
    best = 0.0
    for length in (1, 2, 4, 8):
        best = max(best, sum(0.6**i for i in range(length + 1)) / (1 + 0.1 * length))
    assert simulation.gain > 0.93 * best


def test_width_decides_on_its_own() -> None:
    """The same drafts pay at batch 1 and not at batch 32, where the arithmetic is what a step costs."""
    right, cost = (lambda i, step: 0.6), (lambda w, d: 0.01 + 0.001 * max(0, w + d - 16))
    narrow, wide = Simulation(1, right, cost), Simulation(32, right, cost)
    wide.speculator.length = narrow.speculator.length  # one engine, two phases
    narrow.run(200)
    wide.run(300)
    assert narrow.gain > 1.7
    assert wide.mean_length(150) < 0.3
    narrow.run(50)
    assert narrow.mean_length(50) > 4


def test_it_comes_back_when_the_text_begins_to_copy() -> None:
    simulation = Simulation(1, lambda i, step: 0.0 if step < 2000 else 0.98, free)
    simulation.run(2000)
    assert simulation.mean_length(1000) < 0.5
    assert simulation.gain > 0.98
    simulation.run(60)
    assert simulation.mean_length(10) > 2
    simulation.run(60)
    assert simulation.mean_length(50) > 6


def test_one_copying_sequence_drafts_among_random_ones() -> None:
    simulation = Simulation(8, lambda i, step: 0.98 if i == 0 else 0.0, lambda w, d: 0.01 + 0.0005 * d)
    simulation.run(400)
    tail = simulation.lengths[-100:]
    assert sum(lengths[0] for lengths in tail) / 100 > 2
    assert sum(sum(lengths[1:]) for lengths in tail) / 700 < 0.6
    assert simulation.gain > 1.1


def test_a_step_that_reads_a_prompt_is_not_measured() -> None:
    length = DraftLength(4)
    simulation = Simulation(1, lambda i, step: 1.0, free)
    simulation.speculator.length = length
    simulation.speculator.before(simulation.sequences)
    simulation.now += 100
    [(accepted, token)] = simulation.speculator.after([Verified(simulation.sequences[0], None, [7])], known=501)
    assert (accepted, token) == ([], 7)
    simulation.run(100)
    assert max(length._width(1).seconds[0]) == pytest.approx(free(1, 0))


def test_nothing_is_kept_of_sequences_that_ended() -> None:
    simulation = Simulation(4, lambda i, step: 0.5, free)
    simulation.run(50)
    for s in simulation.sequences:
        simulation.speculator.release(s)
    assert not simulation.speculator.length._own_luck
