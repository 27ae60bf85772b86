"""The engine: many requests in flight over one model, one step at a time.

Usage:
    engine = Engine(model, tokenizer)
    [[completion]] = engine.generate([prompt_ids], SamplingParams(max_tokens=64, temperature=0))

A step: the scheduler chooses tokens, the batch packs them, the runner passes them through the model, the
sampler picks the next ones, each sequence takes its own. Training, evaluation and serving all use this class;
`AsyncEngine` wraps it for a server. Not thread-safe: one thread at a time.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator
from collections.abc import Sequence as ListOf

import torch
from torch import Tensor

from nanoworks.common.errors import UserError
from nanoworks.engine import sampler
from nanoworks.engine.batch import Batch, build_batch
from nanoworks.engine.block_manager import BlockManager
from nanoworks.engine.config import EngineConfig
from nanoworks.engine.request import (
    Completion,
    Delta,
    EngineStats,
    FinishReason,
    Loglikelihood,
    Request,
    SamplingParams,
)
from nanoworks.engine.runner import Runner
from nanoworks.engine.scheduler import Scheduler
from nanoworks.engine.sequence import Sequence
from nanoworks.engine.text import TextStream
from nanoworks.engine.tools import Calculator
from nanoworks.models.decoder import Decoder
from nanoworks.nn.paged import KVShape
from nanoworks.tokenizer.tokenizer import Tokenizer

Progress = Callable[[int, int], None]
"""Called with the number of finished samples and of all."""

_MAX_LOGITS = 2**24
"""Logits held at once when many known tokens are scored: 64 MiB."""


class Engine:
    """Args:
    model: its weights may be changed in place whenever no request is in flight.
    tokenizer: None gives completions without text; then no stop strings and no tools.
    """

    def __init__(self, model: Decoder, tokenizer: Tokenizer | None, config: EngineConfig | None = None) -> None:
        self.config = config = config or EngineConfig()
        self.model, self.tokenizer = model, tokenizer
        self._tools = config.tools and tokenizer is not None and Calculator.supported_by(tokenizer)
        vocab_size = model.config.vocab_size
        if tokenizer is not None and tokenizer.vocab_size > vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model {vocab_size}; "
                "use the tokenizer the model was trained with"
            )
        self._vocab_size = vocab_size if tokenizer is None else tokenizer.vocab_size
        device = model.embed_tokens.weight.device
        shape = KVShape.of(model, device)
        context = model.config.max_position_embeddings
        num_blocks = config.cache_blocks(shape, context, device) + 1  # and the null block
        self._blocks = BlockManager(num_blocks, config.block_size, shape.window)
        self.max_context = min(context, self._blocks.max_length)
        """Most tokens, prompt and output together, that a sequence may have."""
        self._runner = Runner(model, shape, num_blocks=num_blocks, block_size=config.block_size)
        self._scheduler = Scheduler(
            self._blocks, max_num_seqs=config.max_num_seqs, max_batch_tokens=config.max_batch_tokens
        )
        self._requests: dict[str, list[Sequence]] = {}
        self._streams: dict[str, deque[Delta]] = {}
        self._early: list[Delta] = []  # of samples that ended outside a step
        self._steps = self._tokens_computed = self._tokens_generated = self._requests_finished = 0

    # ------------------------------------------------------------------------------------------ whole jobs

    def generate(
        self,
        prompts: ListOf[ListOf[int]],
        params: SamplingParams | ListOf[SamplingParams],
        *,
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """Return the `params.n` completions of each prompt, in order; `params` is for all or one for each."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        requests = [Request(prompt, p) for prompt, p in zip(prompts, each, strict=True)]
        return [[sequence.completion for sequence in group] for group in self._run(requests, progress)]

    def stream(self, prompt: ListOf[int], params: SamplingParams) -> Generator[Delta, None, None]:
        """Yield the deltas of one request as they come; closing the iterator cancels it.

        Streams of one engine may be read in turns: each step serves all of them.
        """
        request = Request(prompt, params)
        self.check(request)
        return self._stream(request)

    def loglikelihood(
        self, pairs: ListOf[tuple[ListOf[int], ListOf[int]]], *, progress: Progress | None = None
    ) -> list[Loglikelihood]:
        """Return the log-likelihood of each (context ids, continuation ids).

        Pairs with the same context share it: it is computed once. The sum is NaN where logits were not finite.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, (context, continuation) in enumerate(pairs):
            if continuation:
                groups.setdefault(tuple(context), []).append(i)
        requests = [
            Request(context, SamplingParams(max_tokens=0), continuations=[pairs[i][1] for i in members])
            for context, members in groups.items()
        ]
        results = [Loglikelihood(0.0, [], True)] * len(pairs)
        for members, sequences in zip(groups.values(), self._run(requests, progress), strict=True):
            for i, sequence in zip(members, sequences, strict=True):
                valid = sequence.completion.finish_reason == "length"
                total = math.fsum(sequence.scores) if valid else math.nan
                results[i] = Loglikelihood(total, sequence.scores, valid and sequence.greedy)
        return results

    # ------------------------------------------------------------------------------------------ step by step

    def add(self, request: Request) -> None:
        """Queue a request; `step` returns its deltas. UserError when it can never run (see `check`)."""
        self.check(request)
        self._add(request)

    def cancel(self, request_id: str) -> None:
        """End a request; its last deltas come with the next step. Does nothing when it has already ended."""
        for sequence in self._requests.get(request_id, []).copy():
            if not sequence.finished:
                self._early += self._end(sequence, "cancelled")

    @property
    def has_work(self) -> bool:
        return bool(self._scheduler.running or self._scheduler.waiting or self._early)

    @torch.no_grad()
    def step(self) -> list[Delta]:
        """Pass one batch through the model; return what it added to each sample.

        If the model raises, all requests end with the reason "error" at the next step.
        """
        deltas, self._early = self._early, []
        plan = self._scheduler.schedule()
        if plan.chunks:
            batch = build_batch(plan, block_size=self.config.block_size, device=self._runner.device)
            try:
                hidden = self._runner.run(batch)
                self._scheduler.commit(plan)
                deltas += self._score(hidden, batch)
                deltas += self._sample(hidden, batch)
            except BaseException:
                self._early = deltas
                for sequence in [s for group in self._requests.values() for s in group]:
                    if not sequence.finished:
                        self._early += self._end(sequence, "error")
                raise
            self._steps += 1
            self._tokens_computed += len(batch.tokens)
        for delta in deltas:
            if delta.request_id in self._streams:
                self._streams[delta.request_id].append(delta)
        return deltas

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            blocks_used=self._blocks.num_used,
            blocks_total=self._blocks.num_total,
            steps=self._steps,
            tokens_computed=self._tokens_computed,
            tokens_generated=self._tokens_generated,
            requests_finished=self._requests_finished,
            preemptions=self._scheduler.num_preemptions,
        )

    def check(self, request: Request) -> None:
        """Raise UserError when `request` can never run."""
        vocab_size = self.model.config.vocab_size
        known = [request.prompt_ids, *request.continuations]
        if not all(len(ids) for ids in known):
            raise UserError("a prompt and a continuation have at least one token; begin the prompt with bos")
        wrong = next((t for ids in known for t in ids if not 0 <= t < vocab_size), None)
        if wrong is not None:
            raise UserError(f"token id {wrong} is outside the model's vocabulary of {vocab_size}")
        if request.params.stop and self.tokenizer is None:
            raise UserError("stop strings need a tokenizer; use stop_ids")
        if request.request_id in self._requests:
            raise UserError(f"a request {request.request_id!r} is already running")
        length = len(request.prompt_ids)
        more = max(map(len, request.continuations), default=min(1, request.params.max_tokens))
        if length + more > self.max_context:
            limit = "context" if self.max_context == self.model.config.max_position_embeddings else "KV cache"
            raise UserError(
                f"the prompt has {length} tokens and needs room for {more} more, but the {limit} holds "
                f"{self.max_context}; shorten the prompt"
            )

    # ---------------------------------------------------------------------------------------------- internals

    def _run(self, requests: ListOf[Request], progress: Progress | None) -> list[list[Sequence]]:
        """Run `requests` to their end and return their sequences; on an exception none is left behind."""
        for request in requests:
            self.check(request)
        total = sum(request.num_sequences for request in requests)
        ids = {request.request_id for request in requests}
        done = 0
        try:
            groups = [self._add(request) for request in requests]
            while done < total:
                ended = sum(d.finish_reason is not None and d.request_id in ids for d in self.step())
                done += ended
                if progress is not None and ended:
                    progress(done, total)
            return groups
        finally:
            for request_id in ids if done < total else ():
                self.cancel(request_id)

    def _stream(self, request: Request) -> Generator[Delta, None, None]:
        queue: deque[Delta] = deque()
        self._streams[request.request_id] = queue
        try:
            unfinished = len(self._add(request))
            while unfinished:
                while queue:
                    delta = queue.popleft()
                    unfinished -= delta.finish_reason is not None
                    yield delta
                if unfinished:
                    self.step()
        finally:
            self.cancel(request.request_id)
            del self._streams[request.request_id]

    def _add(self, request: Request) -> list[Sequence]:
        sequences = [self._sequence(request, index) for index in range(request.num_sequences)]
        first = sequences[0]
        first.forks = sequences[1:]
        self._requests[request.request_id] = sequences
        if first.num_to_compute and (first.max_tokens or first.next_score < first.score_until):
            self._scheduler.add(first)
        else:
            self._early += self._end(first, "length")
        return sequences

    def _sequence(self, request: Request, index: int) -> Sequence:
        params, tokenizer = request.params, self.tokenizer
        ends = () if tokenizer is None or params.ignore_eos else tokenizer.stop_ids
        return Sequence(
            request,
            index,
            max_tokens=min(params.max_tokens, self.max_context - len(request.prompt_ids)),
            stop_ids=frozenset((*ends, *params.stop_ids)),
            seed=sampler.sample_seed(params.seed, index),
            text=None if tokenizer is None else TextStream(tokenizer, params.stop),
            tool=Calculator(tokenizer) if tokenizer is not None and self._tools else None,
        )

    def _score(self, hidden: Tensor, batch: Batch) -> list[Delta]:
        """Record the log-probabilities of known tokens; return the deltas of sequences that end with that."""
        size = max(1, _MAX_LOGITS // self.model.config.vocab_size)
        for start in range(0, len(batch.score_rows), size):
            piece = slice(start, start + size)
            logits = self._runner.logits(hidden, batch.score_rows[piece])
            scores = zip(*sampler.score(logits, batch.score_targets[piece]), strict=True)
            for sequence, (logprob, greedy) in zip(batch.score_sequences[piece], scores, strict=True):
                sequence.scores.append(logprob)
                sequence.greedy &= greedy
        deltas: list[Delta] = []
        for sequence in dict.fromkeys(batch.score_sequences):
            if math.isnan(sequence.scores[-1]):
                deltas += self._end(sequence, "error")
            elif sequence.max_tokens == 0 and sequence.next_score == sequence.score_until:
                deltas += self._end(sequence, "length")
        return deltas

    def _sample(self, hidden: Tensor, batch: Batch) -> list[Delta]:
        """Choose the next token of every sequence that is ready for one."""
        sequences = batch.sample_sequences
        if not sequences:
            return []
        samples = sampler.sample(
            self._runner.logits(hidden, batch.sample_rows),
            [s.request.params for s in sequences],
            [s.seed for s in sequences],
            [len(s.completion.token_ids) for s in sequences],
            vocab_size=self._vocab_size,
        )
        deltas: list[Delta] = []
        rows = zip(sequences, samples.tokens, samples.logprobs, samples.top, strict=True)
        for sequence, token, logprob, top in rows:
            if sequence.finished:  # its prompt's logits were not finite
                continue
            if math.isnan(logprob):
                deltas += self._end(sequence, "error")
                continue
            delta = sequence.append(token, logprob, top)
            self._tokens_generated += len(delta.token_ids)
            deltas.append(delta)
            if sequence.finished:
                self._release(sequence)
        return deltas

    def _end(self, sequence: Sequence, reason: FinishReason) -> list[Delta]:
        """End a sequence, and with it those that still waited to branch off it."""
        deltas = []
        for ended in (sequence, *sequence.forks):
            deltas.append(ended.finish(reason))
            self._release(ended)
        return deltas

    def _release(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        group = self._requests[sequence.request.request_id]
        if all(s.finished for s in group):
            del self._requests[sequence.request.request_id]
            self._requests_finished += 1
