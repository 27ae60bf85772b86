"""Decides which tokens go through the model in the next step.

There are no prefill and decode phases: a step has a budget of tokens, and every sequence contributes what it has
not computed yet, as far as the budget goes: a chunk of a prompt, one sampled token with drafted ones behind it, or a
few forced ones. `running` is in the order of `Sequence.rank`, which is the order of service, but each running sequence
is sure of one token: nobody's output stops behind a long prompt. Who waits is admitted in the order of `fairness`.
When blocks run out, the running sequence of the last rank gives up all of its own, waits again and later recomputes
what it had, save the blocks that it still finds in the prefix cache.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Sequence as ListOf
from dataclasses import dataclass, field
from itertools import islice

from nanoworks.engine.block_manager import BlockChanges, BlockManager
from nanoworks.engine.budget import deal
from nanoworks.engine.fairness import FairQueue, rank_of
from nanoworks.engine.prefix_cache import Key
from nanoworks.engine.sequence import Draft, Sequence


@dataclass(slots=True)
class Chunk:
    """Tokens `start..stop-1` of a sequence, and `draft` behind them: its token i in slot stop + i, at position
    stop + depth. `forks` are the sequences that branch off inside the chunk."""

    sequence: Sequence
    start: int
    stop: int
    forks: list[Sequence] = field(default_factory=list)
    draft: Draft | None = None


@dataclass(slots=True)
class Schedule:
    chunks: list[Chunk] = field(default_factory=list)
    changes: BlockChanges = field(default_factory=BlockChanges)


@dataclass(slots=True)
class Waste:
    """Token slots in blocks that are in use, and those of them that hold no token; summed over the steps."""

    empty: int = 0
    held: int = 0
    now: float = 0.0
    """Share of empty slots before the last step."""
    peak: float = 0.0

    @property
    def mean(self) -> float:
        return self.empty / self.held if self.held else 0.0

    def add(self, empty: int, held: int) -> None:
        self.empty += empty
        self.held += held
        self.now = empty / held if held else 0.0
        self.peak = max(self.peak, self.now)


class Scheduler:
    """Args: `max_num_seqs` sequences and `max_batch_tokens` tokens at most in one step, drafted ones included."""

    def __init__(self, blocks: BlockManager, *, max_num_seqs: int, max_batch_tokens: int) -> None:
        self.blocks = blocks
        self.max_num_seqs, self.max_batch_tokens = max_num_seqs, max_batch_tokens
        self._max_chunk = blocks.max_chunk(max_batch_tokens)
        self.waiting = FairQueue()
        self.running: list[Sequence] = []  # longer than max_num_seqs after forks: the rest waits its turn
        self.num_preemptions = 0
        self.num_prefix_queries = 0
        """Tokens that were looked for in the prefix cache, and could have been found."""
        self.num_prefix_hits = 0
        """Tokens that were not computed because blocks that hold them were found."""
        self.waste = Waste()
        self._steps = 0
        self._moves: list[tuple[int, int]] = []

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that fits into the pool when it is alone (the engine refuses others)."""
        self.waiting.enroll(sequence, self._steps)
        self.waiting.push(sequence)

    def schedule(self) -> Schedule:
        """Choose the next step's tokens and give their sequences blocks; `commit` once the model ran.

        `sequence.draft` is taken where the sequence has its turn, as far as budget and free blocks go: nobody is
        preempted for a draft.
        """
        self._steps += 1
        self._measure_waste()
        plan = Schedule()
        budget = self.max_batch_tokens
        shares = self._deal(budget)
        promised = sum(map(self._still_to_take, self.running))
        turn, preempted = 0, False
        while turn < min(len(self.running), len(shares)):
            sequence = self.running[turn]
            promised -= self._still_to_take(sequence)
            if size := self._extend(plan, sequence, shares[turn], keep=promised):
                budget -= size
                turn += 1
            else:
                self._preempt_last()  # never one with a chunk in this plan: those come before it
                promised = sum(map(self._still_to_take, self.running[turn:]))
                preempted = True
        if not preempted:
            self._admit(plan, budget)
        self._fork(plan)
        if plan.chunks:
            plan.changes.moves, self._moves = self._moves, []
        return plan

    def commit(self, plan: Schedule) -> None:
        """Note that the chunks of `plan`, drafts apart, are in the cache, and give up what has gone out of sight."""
        for chunk in plan.chunks:
            self._advance(chunk.sequence, chunk.start, chunk.stop)
            for fork in chunk.forks:
                self._advance(fork, chunk.start, fork.num_computed)

    def accept(self, chunk: Chunk, path: ListOf[int]) -> None:
        """Note which tokens of `chunk.draft` were right, and give up the blocks that the others had.

        To be called after `commit`, for every chunk with a draft whose sequence goes on; `sequence.ids` has the tokens
        of `path` by then.

        Args:
            path: the indices of the accepted tokens in the draft, from the known tokens on; maybe empty.
        """
        sequence, start, size = chunk.sequence, chunk.stop, self.blocks.block_size
        assert chunk.draft is not None
        assert [chunk.draft.tokens[i] for i in path] == sequence.ids[start : start + len(path)], "not the ids' tokens"
        table = sequence.block_table
        for depth, i in enumerate(path):
            if i != depth:
                source, target = (table[at // size] * size + at % size for at in (start + i, start + depth))
                self._moves.append((source, target))
        self._advance(sequence, start, start + len(path))
        self.blocks.trim(table, sequence.num_computed)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that ended, and take its blocks back."""
        self.waiting.leave(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
        self.blocks.free(sequence.block_table)

    # ------------------------------------------------------------------------------------------ those that run

    def _deal(self, budget: int) -> list[int]:
        """Tokens that each running sequence may take, as far as seats and the budget go; the rest is for newcomers."""
        seats = self.running[: self.max_num_seqs]
        wants = [s.num_to_compute - s.num_computed + (0 if s.draft is None else len(s.draft)) for s in seats]
        shares, _ = deal(wants, [s.num_to_compute for s in self._coming()], budget)
        return [share for share in shares if share]

    def _extend(self, plan: Schedule, sequence: Sequence, limit: int, *, keep: int = 0) -> int:
        """Give a sequence a chunk of at most `limit` tokens; returns its size, 0 when there are too few blocks.

        A draft leaves `keep` blocks to the others.
        """
        blocks, table = self.blocks, sequence.block_table
        start, limit = sequence.num_computed, min(limit, self._max_chunk)
        stop = min(sequence.num_to_compute, start + limit)
        if not blocks.reserve(table, start, stop, plan.changes):
            return 0
        chunk = Chunk(sequence, start, stop)
        plan.chunks.append(chunk)
        self.waiting.serve(sequence, stop - start, self._steps)
        draft, sequence.draft = sequence.draft, None
        if draft is None or stop < len(sequence.ids):
            return stop - start
        draft = draft.first(start + limit - stop)
        if blocks.num_free - (blocks.blocks_for(stop + len(draft)) - blocks.blocks_for(stop)) < keep:
            draft = draft.first(-stop % blocks.block_size)  # what the last block has room for costs nothing
        if draft.tokens:
            reserved = blocks.reserve(table, stop, stop + len(draft), plan.changes)
            assert reserved, "blocks were counted wrong"
            chunk.draft = draft
        return stop - start + len(draft)

    def _preempt_last(self) -> None:
        sequence = self.running.pop()
        self.blocks.free(sequence.block_table)
        sequence.num_computed = 0
        sequence.draft = None
        self.waiting.push(sequence)
        self.num_preemptions += 1

    def _fork(self, plan: Schedule) -> None:
        """Let the other samples of a request share the blocks of its first once that has read the prompt."""
        for chunk in plan.chunks:
            first = chunk.sequence
            prompt = first.prompt_length
            if first.forks and chunk.stop >= prompt:
                chunk.forks, first.forks = first.forks, []
                for fork in chunk.forks:
                    fork.block_table = self.blocks.fork(first.block_table, prompt)
                    fork.num_computed = prompt
                at = self.running.index(first) + 1
                self.running[at:at] = chunk.forks

    def _advance(self, sequence: Sequence, start: int, stop: int) -> None:
        """Tokens `start..stop-1` of the sequence are in the cache."""
        sequence.num_computed = stop
        self.blocks.enter(sequence.block_table, sequence.ids, start, stop, sequence.request.cache_salt)
        self.blocks.drop(sequence.block_table, sequence.ids, start, stop)

    # ------------------------------------------------------------------------------------------ those that wait

    def _coming(self) -> list[Sequence]:
        """Who waits and may find a seat, in turn as it is now."""
        if not self.waiting or len(self.running) >= self.max_num_seqs:
            return []
        return list(islice(self.waiting.in_turn(self._steps), self.max_num_seqs - len(self.running)))

    def _admit(self, plan: Schedule, budget: int) -> None:
        """Let waiting sequences begin while there are seats, tokens and blocks for them."""
        if not self.waiting:
            return
        promised = sum(map(self._still_to_take, self.running))
        under_way = {
            self._next_key(c.sequence, c.sequence.block_table, c.start, len(c.sequence.ids)) for c in plan.chunks
        }
        put_off = 0
        coming = self._coming()
        shares = dict(zip(coming, deal([s.num_to_compute for s in coming], [], budget)[0], strict=True))
        for sequence in self.waiting.in_turn(self._steps):
            if len(self.running) + put_off >= self.max_num_seqs or not budget:
                return
            limit = _reusable(sequence)
            salt = sequence.request.cache_salt
            found = self.blocks.match(sequence.ids, limit, salt) if limit and self.blocks.prefix_caching else []
            start = len(found) * self.blocks.block_size
            key = self._next_key(sequence, found, start, limit)
            if key is not None and key in under_way:
                put_off += 1  # another sequence computes in this step what this one can share in the next
                continue
            # All known tokens must fit beside what the running ones still need for theirs, so that no newcomer stops
            # a prompt halfway, and there is a block for the next growth of each: a newcomer that would be preempted
            # at once only costs time.
            need = self.blocks.most_blocks(sequence.num_to_compute, self._max_chunk) - len(found)
            spare = self.blocks.num_free - self.blocks.num_idle(found) - need - promised
            if spare < len(self.running):
                return
            self.blocks.adopt(sequence.block_table, found)
            sequence.num_computed = start
            size = self._extend(plan, sequence, min(budget, max(self.blocks.block_size, shares.get(sequence, 0))))
            assert size, "blocks were counted wrong"
            budget -= size
            self.num_prefix_queries += limit
            self.num_prefix_hits += start
            if sequence.started is None:
                sequence.started, sequence.num_cached = time.perf_counter(), start
            self.waiting.discard(sequence)
            insort(self.running, sequence, key=rank_of)
            promised += self._still_to_take(sequence)
            under_way.add(key)

    def _still_to_take(self, sequence: Sequence) -> int:
        """Blocks that the known tokens of a running sequence need beyond those it holds."""
        return max(0, self.blocks.most_blocks(sequence.num_to_compute, self._max_chunk) - len(sequence.block_table))

    def _next_key(self, sequence: Sequence, blocks: ListOf[int] | dict[int, int], start: int, stop: int) -> Key | None:
        """Key of the block with token `start`, which comes behind `blocks`; None if it is not full before `stop`."""
        place = start // self.blocks.block_size
        if not self.blocks.prefix_caching or (place + 1) * self.blocks.block_size > stop:
            return None
        return self.blocks.next_key(sequence.ids, blocks, place, sequence.request.cache_salt)

    def _measure_waste(self) -> None:
        size = self.blocks.block_size
        filled: dict[int, int] = {}  # tokens in each block that is not full; those shared are counted once
        for sequence in self.running:
            for place in reversed(sequence.block_table):
                tokens = sequence.num_computed - place * size
                if tokens >= size:
                    break
                block = sequence.block_table[place]
                filled[block] = max(filled.get(block, 0), tokens)
        if self.running:
            self.waste.add(sum(size - max(0, tokens) for tokens in filled.values()), self.blocks.num_used * size)


def _reusable(sequence: Sequence) -> int:
    """Number of first tokens that need not be computed if they are in the cache.

    The row of the token before a scored or a sampled one is always computed, because its logits are needed;
    an embedding needs the rows of all.
    """
    if sequence.request.pooling is not None:
        return 0
    stop = sequence.num_to_compute - (sequence.max_tokens > 0)
    if sequence.next_score < sequence.score_until:
        stop = min(stop, sequence.next_score - 1)
    return stop
