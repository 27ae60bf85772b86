"""What comes out of a step: from hidden states to scores, sampled tokens, accepted drafts and embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from nanoworks.engine import sampler
from nanoworks.engine.batch import Batch
from nanoworks.engine.request import NOT_FINITE, Delta
from nanoworks.engine.runner import Runner
from nanoworks.engine.scheduler import Chunk, Scheduler
from nanoworks.engine.sequence import Sequence
from nanoworks.engine.speculation import Speculator, Verified
from nanoworks.engine.workers import ParallelRunner

End = Callable[..., list[Delta]]
"""`end(sequence, reason, error="")` ends a sequence and returns its last deltas, and those of its forks."""

_MAX_LOGITS = 2**24
"""Logits held at once when many known tokens are scored: 64 MiB."""


class Outputs:
    """Args:
    vocab_size: of the tokenizer, which may be less than the model's.
    end: see `End`.
    release: takes back what a sequence held that has ended by itself.
    """

    def __init__(
        self,
        runner: Runner | ParallelRunner,
        scheduler: Scheduler,
        speculator: Speculator | None,
        *,
        vocab_size: int,
        end: End,
        release: Callable[[Sequence], None],
    ) -> None:
        self._runner, self._scheduler, self._speculator = runner, scheduler, speculator
        self._vocab_size, self._end, self._release = vocab_size, end, release
        self.tokens_generated = 0

    def take(self, hidden: Tensor, batch: Batch) -> list[Delta]:
        """Give each sequence of `batch` what the step computed for it, after the scheduler's `commit`.

        Args:
            hidden: (N, hidden_size), the runner's.
        """
        return self._pool(hidden, batch) + self._score(hidden, batch) + self._sample(hidden, batch)

    def _pool(self, hidden: Tensor, batch: Batch) -> list[Delta]:
        """Add up the hidden states of prompts that are to become embeddings; return those that are whole."""
        deltas: list[Delta] = []
        for chunk, first_row in batch.pooled:
            sequence, rows = chunk.sequence, slice(first_row, first_row + chunk.stop - chunk.start)
            # Row by row and in double precision, so that it does not matter how a prompt was cut into chunks.
            total = self._runner.model.head.norm(hidden[rows]).double().sum(0)
            # From the first chunk, or after a preemption again, the sum starts anew.
            sequence.hidden = total if chunk.start == 0 or sequence.hidden is None else sequence.hidden + total
            if chunk.stop == sequence.prompt_length:
                mean = (sequence.hidden / sequence.prompt_length).tolist()
                if not all(map(math.isfinite, mean)):
                    deltas += self._end(sequence, "error", NOT_FINITE)
                    continue
                deltas += self._end(sequence, "length")
                deltas[-1].embedding = mean
        return deltas

    def _score(self, hidden: Tensor, batch: Batch) -> list[Delta]:
        """Record the log-probabilities of known tokens; return the deltas of sequences that end with that."""
        size = max(1, _MAX_LOGITS // self._runner.model.config.vocab_size)
        for start in range(0, len(batch.score_rows), size):
            piece = slice(start, start + size)
            logits = self._runner.logits(hidden, batch.score_rows[piece])
            sequences = batch.score_sequences[piece]
            scores = zip(*sampler.score(logits, batch.score_targets[piece]), strict=True)
            counts = [sequence.request.params.logprobs or 0 for sequence in sequences]
            tops = sampler.top(logits, counts, vocab_size=self._vocab_size)
            for sequence, (logprob, greedy), top in zip(sequences, scores, tops, strict=True):
                sequence.scores.append(logprob)
                sequence.score_tops.append(top)
                sequence.greedy &= greedy
        deltas: list[Delta] = []
        for sequence in dict.fromkeys(batch.score_sequences):
            if math.isnan(sequence.scores[-1]):
                deltas += self._end(sequence, "error", NOT_FINITE)
            elif sequence.max_tokens == 0 and sequence.next_score == sequence.score_until:
                deltas += self._end(sequence, "length")
        return deltas

    def _sample(self, hidden: Tensor, batch: Batch) -> list[Delta]:
        """Choose the next token of every sequence that is ready for one, and those after it that were drafted well."""
        rows = batch.samples
        if not rows:
            return []
        logits = self._runner.logits(hidden, batch.sample_rows)
        samples = sampler.sample(logits, rows, vocab_size=self._vocab_size)
        paths = self._verify(batch, samples, logits)
        deltas: list[Delta] = []
        row = 0
        while row < len(rows):
            sequence = rows[row].sequence
            chunk, path = paths.get(row, (None, []))
            used = [row, *(row + 1 + i for i in path)]  # the rows whose tokens are taken, one after the other
            row += 1 + (0 if chunk is None or chunk.draft is None else len(chunk.draft))
            if sequence.finished:  # its prompt's logits were not finite
                continue
            taken = 0
            for at in used:
                if math.isnan(samples.logprobs[at]):
                    deltas += self._end(sequence, "error", samples.errors[at])
                    break
                delta = sequence.append(samples.tokens[at], samples.logprobs[at], samples.top[at])
                self.tokens_generated += len(delta.token_ids)
                deltas.append(delta)
                taken += 1
                if sequence.finished:
                    self._release(sequence)
                    break
                if len(delta.token_ids) > 1:  # a tool went on otherwise than the draft
                    break
            if sequence.finished:
                continue
            if chunk is not None and chunk.draft is not None:
                self._scheduler.accept(chunk, path[: taken - 1])
            if self._speculator is not None and self._speculator.needs_hidden:
                row_of_newest = batch.sample_rows[used[taken - 1]]
                sequence.hidden = hidden[row_of_newest].clone()  # a view would keep the whole step's
        return deltas

    def _verify(self, batch: Batch, samples: sampler.Samples, logits: Tensor) -> dict[int, tuple[Chunk, list[int]]]:
        """For the first row of each chunk: the chunk, and which of its drafted tokens were right."""
        if self._speculator is None:
            return {row: (chunk, []) for chunk, row in batch.verified}
        verified = []
        for chunk, row in batch.verified:
            end = row + 1 + (0 if chunk.draft is None else len(chunk.draft))
            warm = None
            if self._speculator.typical:
                warm = sampler.probabilities(logits[row:end], batch.samples[row:end], vocab_size=self._vocab_size).log()
            verified.append(Verified(chunk.sequence, chunk.draft, samples.tokens[row:end], warm))
        drafted = sum(len(v.draft) for v in verified if v.draft is not None)
        outcomes = self._speculator.after(verified, known=len(batch.tokens) - drafted)
        if self._speculator.typical:
            for (chunk, row), (path, _) in zip(batch.verified, outcomes, strict=True):
                _take_drafted(chunk, path, row, samples, logits)
        return {row: (chunk, path) for (chunk, row), (path, _) in zip(batch.verified, outcomes, strict=True)}


def _take_drafted(chunk: Chunk, path: list[int], row: int, samples: sampler.Samples, logits: Tensor) -> None:
    """Put the tokens of `path` in the place of those sampled in their stead. Args: `row`, the chunk's first one."""
    if chunk.draft is not None and path:
        rows = [row, *(row + 1 + i for i in path[:-1])]
        tokens = [chunk.draft.tokens[i] for i in path]
        logprobs, _ = sampler.score(logits[rows], tokens)
        for at, token, logprob in zip(rows, tokens, logprobs, strict=True):
            samples.tokens[at], samples.logprobs[at] = token, logprob
