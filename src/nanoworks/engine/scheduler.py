"""Decides which tokens go through the model in the next step.

There are no prefill and decode phases: a step has a budget of tokens, and every sequence contributes what it has
not computed yet, as far as the budget goes: a chunk of a prompt, one sampled token, or a few forced ones. First
come, first served: `running + waiting` is always in order of arrival. When blocks run out, the youngest running
sequence gives up all of its own, goes back to the front of the queue and later recomputes what it had.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from nanoworks.engine.block_manager import BlockChanges, BlockManager
from nanoworks.engine.sequence import Sequence


@dataclass(slots=True)
class Chunk:
    """Tokens `start..stop-1` of a sequence; `forks` are the sequences that branch off inside it."""

    sequence: Sequence
    start: int
    stop: int
    forks: list[Sequence] = field(default_factory=list)


@dataclass(slots=True)
class Schedule:
    chunks: list[Chunk] = field(default_factory=list)
    changes: BlockChanges = field(default_factory=BlockChanges)


class Scheduler:
    """Args: `max_num_seqs` sequences and `max_batch_tokens` tokens at most in one step."""

    def __init__(self, blocks: BlockManager, *, max_num_seqs: int, max_batch_tokens: int) -> None:
        self.blocks = blocks
        self.max_num_seqs, self.max_batch_tokens = max_num_seqs, max_batch_tokens
        self._max_chunk = blocks.max_chunk(max_batch_tokens)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # longer than max_num_seqs after forks: the rest waits its turn
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that fits into the pool when it is alone (the engine refuses others)."""
        self.waiting.append(sequence)

    def schedule(self) -> Schedule:
        """Choose the next step's tokens and give their sequences blocks; `commit` once the model ran."""
        plan = Schedule()
        budget = self.max_batch_tokens
        turn = 0
        while turn < len(self.running) and len(plan.chunks) < self.max_num_seqs and budget:
            sequence = self.running[turn]
            if not self._reserve(sequence, plan.changes):
                self._preempt_youngest()  # never one with a chunk in this plan: those are all older
                continue
            budget -= self._add_chunk(plan, sequence, budget)
            turn += 1
        while self.waiting and len(self.running) < self.max_num_seqs and budget:
            sequence = self.waiting[0]
            # One block for the next growth of each running sequence: a newcomer that would be preempted
            # at once only costs time.
            spare = self.blocks.num_free - self.blocks.most_blocks(sequence.num_to_compute, self._max_chunk)
            if spare < len(self.running) or not self._reserve(sequence, plan.changes):
                break
            self.running.append(self.waiting.popleft())
            budget -= self._add_chunk(plan, sequence, budget)
        self._fork(plan)
        return plan

    def commit(self, plan: Schedule) -> None:
        """Note that the chunks of `plan` are in the cache now, and give up what has gone out of sight."""
        for chunk in plan.chunks:
            chunk.sequence.num_computed = chunk.stop
            for sequence in (chunk.sequence, *chunk.forks):
                self.blocks.drop(sequence.block_table, sequence.ids, chunk.start, sequence.num_computed)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that ended, and take its blocks back."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self.blocks.free(sequence.block_table)

    def _reserve(self, sequence: Sequence, changes: BlockChanges) -> bool:
        """Take blocks for all known tokens, so that no newcomer stops a prompt halfway; where a window bounds what a
        sequence holds, for the longest chunk."""
        return self.blocks.reserve(sequence.block_table, sequence.num_computed, self._stop(sequence), changes)

    def _stop(self, sequence: Sequence) -> int:
        """End of the longest chunk that the sequence may have now."""
        return min(sequence.num_to_compute, sequence.num_computed + self._max_chunk)

    def _add_chunk(self, plan: Schedule, sequence: Sequence, budget: int) -> int:
        start = sequence.num_computed
        stop = min(self._stop(sequence), start + budget)
        plan.chunks.append(Chunk(sequence, start, stop))
        return stop - start

    def _preempt_youngest(self) -> None:
        sequence = self.running.pop()
        self.blocks.free(sequence.block_table)
        sequence.num_computed = 0
        self.waiting.appendleft(sequence)
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
