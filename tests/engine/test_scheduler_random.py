"""The scheduler under random operations, with a model of the cache's content beside it.

A cache slot holds a node of the tree of all token prefixes: whoever reads a slot must find its own prefix there. So a
block that was handed out twice, evicted while in use, found by the wrong tokens or not moved shows at once.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoworks.engine.block_manager import BlockManager
from nanoworks.engine.request import Request, SamplingParams
from nanoworks.engine.scheduler import Chunk, Schedule, Scheduler
from nanoworks.engine.sequence import Draft, Sequence
from nanoworks.nn.context import Window

OPERATIONS = 2000
EXAMPLES = 50
MOST_TOKENS = 40
ALPHABET = 2  # so that prefixes meet


class Simulation:
    """An engine whose model writes down, and checks, what it reads. All choices come from `seed`."""

    def __init__(self, seed: int, window: Window | None) -> None:
        self.rng = rng = random.Random(seed)
        self.size = rng.randint(1, 5)
        most = -(-MOST_TOKENS // self.size)
        self.blocks = BlockManager(
            rng.randint(most, most + most // 2) + 1, self.size, window, prefix_caching=rng.random() < 0.9
        )
        self.scheduler = Scheduler(
            self.blocks, max_num_seqs=rng.randint(1, 8), max_batch_tokens=rng.choice([1, 3, 8, 20, 60])
        )
        self.window = window
        self.memory: dict[int, object] = {}
        self.nodes: dict[object, int] = {}
        self.live: list[Sequence] = []
        self.ended = self.added = self.accepted = 0

    def run(self, operations: int) -> None:
        for _ in range(operations):
            self.rng.choice([self.add, self.cancel, *[self.step] * 5])()
            self.blocks.check(sequence.block_table for sequence in self.live)
        for _ in range(100 * MOST_TOKENS * (1 + len(self.live))):
            if not self.live:
                break
            self.step()
        assert not self.live, "somebody starves"
        assert not self.scheduler.running
        assert not self.scheduler.waiting
        assert self.blocks.num_used == 0

    def add(self) -> None:
        if len(self.live) > 20:
            return
        rng = self.rng
        length = rng.randint(1, MOST_TOKENS - 2)
        prompt = self.text(length)
        room = MOST_TOKENS - length
        kind = rng.random()
        params, continuations = SamplingParams(max_tokens=rng.randint(1, room), n=rng.choice([1, 1, 1, 3])), []
        if kind < 0.15:
            params = SamplingParams(max_tokens=rng.choice([0, room]), prompt_logprobs=True)
        elif kind < 0.3:
            params = SamplingParams(max_tokens=0)
            continuations = [self.text(rng.randint(1, room)) for _ in range(rng.randint(1, 3))]
        request = Request(
            prompt,
            params,
            continuations=continuations,
            priority=rng.randint(-1, 2),
            client=rng.choice("abc"),
            cache_salt=rng.choice(["", "", "salt"]),
        )
        samples = [
            Sequence(request, i, max_tokens=params.max_tokens, stop_ids=frozenset(), seed=0, text=None, tool=None)
            for i in range(request.num_sequences)
        ]
        if samples[0].num_to_compute == 0:  # a prompt of one token has nothing to score
            return
        samples[0].forks = samples[1:]
        self.live += samples
        self.added += len(samples)
        self.scheduler.add(samples[0])

    def cancel(self) -> None:
        if self.live and self.rng.random() < 0.5:
            victim = self.rng.choice([s for s in self.live if not any(s in other.forks for other in self.live)])
            for ended in (victim, *victim.forks):
                self.end(ended, "cancelled")

    def end(self, sequence: Sequence, reason: str) -> None:
        if not sequence.finished:
            sequence.finish(reason)  # type: ignore[arg-type]
        self.scheduler.remove(sequence)
        self.live.remove(sequence)
        self.ended += 1

    def step(self) -> None:
        for sequence in self.scheduler.running:
            if sequence.max_tokens and sequence.num_computed == len(sequence.ids) - 1:
                sequence.draft = self.draft(sequence)
        plan = self.scheduler.schedule()
        assert plan.chunks or not self.live, "there is work and nothing is done"
        sizes = [chunk.stop - chunk.start + len(chunk.draft or ()) for chunk in plan.chunks]
        assert sum(sizes) <= self.scheduler.max_batch_tokens
        assert len(sizes) <= self.scheduler.max_num_seqs
        assert len({id(chunk.sequence) for chunk in plan.chunks}) == len(sizes)
        assert all(chunk.stop > chunk.start for chunk in plan.chunks)
        seats = min(len(self.scheduler.running), self.scheduler.max_num_seqs, self.scheduler.max_batch_tokens)
        assert len(sizes) >= seats - sum(len(chunk.forks) for chunk in plan.chunks), (
            "a running sequence was passed over"
        )
        assert [s.rank for s in self.scheduler.running] == sorted(s.rank for s in self.scheduler.running)
        self.apply(plan)
        for chunk in plan.chunks:
            self.compute(chunk)
        self.scheduler.commit(plan)
        for chunk in plan.chunks:
            self.answer(chunk)

    def text(self, length: int) -> list[int]:
        return [self.rng.randrange(ALPHABET) for _ in range(length)]

    def draft(self, sequence: Sequence) -> Draft | None:
        size = min(self.rng.randint(0, 5), sequence.max_tokens - len(sequence.completion.token_ids) - 1)
        tree = self.rng.random() < 0.5
        parents = [self.rng.randint(-1, i - 1) if tree else i - 1 for i in range(size)]
        return Draft(self.text(size), parents) if size else None

    # ---------------------------------------------------------------------------------------------- the cache

    def apply(self, plan: Schedule) -> None:
        memory, size = self.memory, self.size
        moved = [(target, memory[source]) for source, target in plan.changes.moves]
        memory.update(moved)
        copied = [(b * size + i, memory.get(a * size + i)) for a, b in plan.changes.copies for i in range(size)]
        memory.update(copied)
        for block in plan.changes.fresh:
            memory.update((block * size + i, None) for i in range(size))

    def node(self, before: object, token: int) -> int:
        """The prefix that ends with `token` behind the prefix `before`."""
        return self.nodes.setdefault((before, token), len(self.nodes))

    def slot(self, sequence: Sequence, at: int) -> int:
        return sequence.block_table[at // self.size] * self.size + at % self.size

    def compute(self, chunk: Chunk) -> None:
        """Read what the first token of the chunk sees, and write down all of its tokens."""
        sequence, window = chunk.sequence, self.window
        before: object = sequence.request.cache_salt
        for at in range(chunk.stop):
            token = sequence.ids[at]
            node = self.node(before, token)
            if at >= chunk.start:
                self.memory[self.slot(sequence, at)] = node
            elif window is None or at > chunk.start - window.size or at < window.first or token in window.token_ids:
                assert self.memory[self.slot(sequence, at)] == node, "a sequence reads what is not its prefix"
            before = node
        if chunk.draft is not None:
            assert chunk.stop == len(sequence.ids)
            drafted: list[object] = []
            for i, (token, parent) in enumerate(zip(chunk.draft.tokens, chunk.draft.parents, strict=True)):
                assert parent < i
                drafted.append(self.node(before if parent < 0 else drafted[parent], token))
                self.memory[self.slot(sequence, chunk.stop + i)] = drafted[i]

    # --------------------------------------------------------------------------------------------- the outputs

    def answer(self, chunk: Chunk) -> None:
        for sequence in (chunk.sequence, *chunk.forks):
            stop = sequence.num_computed
            if sequence.next_score < sequence.score_until:
                assert chunk.start < sequence.next_score, "a row that is to be scored was left out"
                known = min(sequence.score_until, stop + 1)
                sequence.scores += [0.0] * (known - sequence.next_score)
            if sequence.max_tokens and stop == len(sequence.ids):
                self.sample(sequence, chunk)
            elif not sequence.max_tokens and sequence.next_score == sequence.score_until:
                self.end(sequence, "length")

    def sample(self, sequence: Sequence, chunk: Chunk) -> None:
        draft = chunk.draft if sequence is chunk.sequence else None
        path: list[int] = []
        while draft is not None and self.rng.random() < 0.7:
            children = [i for i, parent in enumerate(draft.parents) if parent == (path[-1] if path else -1)]
            if not children:
                break
            path.append(self.rng.choice(children))
        tokens = [draft.tokens[i] for i in path] if draft is not None else []
        for token in [*tokens, *self.text(1)]:
            sequence.append(token, 0.0, None)
            if sequence.finished:
                return self.end(sequence, "length")
        if draft is not None:
            self.scheduler.accept(chunk, path)
            self.accepted += len(path)
        return None


@given(seed=st.integers(0, 2**32))
@settings(max_examples=EXAMPLES, deadline=None)
def test_a_hundred_thousand_operations_keep_every_prefix_and_starve_nobody(seed: int) -> None:
    simulation = Simulation(seed, None)
    simulation.run(OPERATIONS)
    assert simulation.ended == simulation.added


@pytest.mark.parametrize(
    "window", [Window(1), Window(7), Window(9, first=3), Window(5, token_ids=(0,)), Window(4, token_ids=(2, 9))]
)
@pytest.mark.parametrize("seed", range(4))
def test_and_so_with_a_window(seed: int, window: Window) -> None:
    Simulation(seed, window).run(300)


def test_the_random_operations_reach_what_they_are_about() -> None:
    simulations = [Simulation(seed, None) for seed in range(12)]
    for simulation in simulations:
        simulation.run(500)
    assert sum(s.scheduler.num_preemptions for s in simulations) > 50
    assert sum(s.scheduler.num_prefix_hits for s in simulations) > 300
    assert sum(s.accepted for s in simulations) > 1000
