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

from nanoworks.common.errors import UserError
from nanoworks.engine import sampler
from nanoworks.engine.batch import build_batch
from nanoworks.engine.block_manager import BlockManager
from nanoworks.engine.checks import check_request
from nanoworks.engine.config import EngineConfig
from nanoworks.engine.guidance import Compiling
from nanoworks.engine.outputs import Outputs
from nanoworks.engine.request import (
    NOT_FINITE,
    Completion,
    Delta,
    EngineStats,
    FinishReason,
    Loglikelihood,
    QueueFull,
    Request,
    SamplingParams,
)
from nanoworks.engine.runner import Runner
from nanoworks.engine.scheduler import Scheduler
from nanoworks.engine.sequence import Sequence
from nanoworks.engine.sizing import cache_blocks, for_device
from nanoworks.engine.speculation import Speculator
from nanoworks.engine.text import TextStream
from nanoworks.engine.tools import Calculator
from nanoworks.engine.workers import Workers
from nanoworks.models.decoder import Decoder
from nanoworks.nn import kernels
from nanoworks.nn.kernel_context import BLOCK_SIZE
from nanoworks.nn.paged import KVShape
from nanoworks.tokenizer.tokenizer import Tokenizer

Progress = Callable[[int, int], None]
"""Called with the number of finished samples and of all."""


class Engine:
    """Args:
    model: its weights may be changed in place whenever no request is in flight; the next one is computed with the new.
    tokenizer: None gives completions without text; then no stop strings and no tools.
    workers: those that loaded `model`, which is then this rank's share (see `engine.workers`).
    consume: the caller gives `model` away, and it may be changed: so that its weights need not be in memory twice.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer | None,
        config: EngineConfig | None = None,
        *,
        workers: Workers | None = None,
        consume: bool = False,
    ) -> None:
        self.config = config = config or EngineConfig()
        config.check()
        self.model, self.tokenizer = model, tokenizer
        ranks = 1 if workers is None else workers.size
        if config.tensor_parallel != ranks:
            raise UserError(
                f"tensor_parallel={config.tensor_parallel}, but the model is spread over {ranks}; it is spread when it "
                f"is loaded: nanoworks.load(path, tensor_parallel={config.tensor_parallel})"
            )
        self._tools = config.tools and tokenizer is not None and Calculator.supported_by(tokenizer)
        if self._tools and config.typical_acceptance and config.speculate != "none":
            raise UserError("typical_acceptance may change what the model tells its calculator; set tools=false")
        vocab_size = model.config.vocab_size
        if tokenizer is not None and tokenizer.vocab_size > vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model {vocab_size}; "
                "use the tokenizer the model was trained with"
            )
        self._vocab_size = vocab_size if tokenizer is None else tokenizer.vocab_size
        device = model.embed_tokens.weight.device
        shape = KVShape.of(model, device) if workers is None else workers.shape
        self.config = config = for_device(config, shape, device)
        context = model.config.max_position_embeddings
        num_blocks = cache_blocks(config, shape, context, device) + 1  # and the null block
        self._blocks = BlockManager(num_blocks, config.block_size, shape.window, prefix_caching=config.prefix_caching)
        self.max_context = min(context, self._blocks.max_length)
        """Most tokens, prompt and output together, that a sequence may have."""
        make_runner = Runner if workers is None else workers.runner
        self._speculator = Speculator.of(config, model, tokenizer)
        self._runner = make_runner(
            model,
            shape,
            num_blocks=num_blocks,
            block_size=config.block_size,
            quantize=config.quantize,
            kv_int8=config.kv_dtype == "int8",
            consume=consume and workers is None and config.speculate != "medusa",  # whose heads look at the model's
            graph_rows=config.max_num_seqs if config.cuda_graphs and workers is None else 0,
        )
        if config.batch_invariant and not self._runner.uses_kernels:
            reason = kernels.why_not() or f"they are for a CPU and block_size={BLOCK_SIZE}"
            raise UserError(f"only the CPU kernels promise batch_invariant ({reason}); leave it out")
        self._weights = _stamp(model)
        self._scheduler = Scheduler(
            self._blocks, max_num_seqs=config.max_num_seqs, max_batch_tokens=config.max_batch_tokens
        )
        self._outputs = Outputs(
            self._runner,
            self._scheduler,
            self._speculator,
            vocab_size=self._vocab_size,
            end=self._end,
            release=self._release,
        )
        self._requests: dict[str, list[Sequence]] = {}
        self._streams: dict[str, deque[Delta]] = {}
        self._early: list[Delta] = []  # of samples that ended outside a step
        self._compiling = Compiling(tokenizer)  # requests that wait for their grammar
        self._steps = self._tokens_computed = self._requests_finished = 0

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
        return bool(self._scheduler.running or self._scheduler.waiting or self._early or self._compiling)

    @torch.no_grad()
    def step(self) -> list[Delta]:
        """Pass one batch through the model; return what it added to each sample.

        If the model raises, all requests end with the reason "error" at the next step.
        """
        if self._compiling:
            self._start_compiled()
        deltas, self._early = self._early, []
        self._draft()
        plan = self._scheduler.schedule()
        if plan.chunks:
            batch = build_batch(plan, block_size=self.config.block_size, device=self._runner.device)
            try:
                hidden = self._runner.run(batch)
                self._scheduler.commit(plan)
                deltas += self._outputs.take(hidden, batch)
            except BaseException:
                self._early = deltas
                self._blocks.forget_prefixes()  # a block may lack what the step should have moved into it
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
            tokens_generated=self._outputs.tokens_generated,
            requests_finished=self._requests_finished,
            preemptions=self._scheduler.num_preemptions,
            blocks_cached=self._blocks.num_cached,
            prefix_queries=self._scheduler.num_prefix_queries,
            prefix_hits=self._scheduler.num_prefix_hits,
            drafted=0 if self._speculator is None else self._speculator.drafted,
            draft_accepted=0 if self._speculator is None else self._speculator.accepted,
            kv_waste=self._scheduler.waste.now,
            kv_waste_mean=self._scheduler.waste.mean,
            kv_waste_peak=self._scheduler.waste.peak,
        )

    def check_queue(self, arriving: int = 0) -> None:
        """Raise QueueFull when `config.max_queue` requests wait, those counted that are `arriving`.

        Only a server asks: a job that hands over all its requests at once may be of any size.
        """
        waiting = len(self._scheduler.waiting) + arriving
        if waiting >= self.config.max_queue:
            raise QueueFull(waiting, self.config.max_queue)

    def check(self, request: Request) -> None:
        """Raise UserError when `request` can never run."""
        if request.request_id in self._requests:
            raise UserError(f"a request {request.request_id!r} is already running")
        if request.params.grammar is not None:
            self._compiling.check()
        check_request(
            request,
            self.config,
            self.model.config,
            known=None if self.tokenizer is None else self._vocab_size,
            room=self.max_context,
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

    def _refresh(self) -> None:
        """Take the weights again if they were changed since the last request."""
        stamp = _stamp(self.model)
        if stamp != self._weights:
            self._weights = stamp
            self._runner.refresh()
            self._blocks.forget_prefixes()

    def _add(self, request: Request) -> list[Sequence]:
        if not self._requests:
            self._refresh()
        sequences = [self._sequence(request, index) for index in range(request.num_sequences)]
        first = sequences[0]
        first.forks = sequences[1:]
        self._requests[request.request_id] = sequences
        if request.params.grammar is not None and first.max_tokens:
            self._compiling.add(request.request_id, request.params.grammar)
        elif first.num_to_compute and (first.max_tokens or request.pooling or first.next_score < first.score_until):
            self._scheduler.add(first)
        else:
            self._early += self._end(first, "length")
        return sequences

    def _start_compiled(self) -> None:
        """Queue the requests whose grammars are ready, and end those whose grammars are wrong."""
        idle = not (self._scheduler.running or self._scheduler.waiting or self._early)
        for request_id, grammar in self._compiling.take(wait=idle):
            first, *others = self._requests[request_id]
            if isinstance(grammar, str):
                self._early += self._end(first, "error", grammar)
                continue
            for sequence in (first, *others):
                sequence.grammar = grammar.start(sequence.stop_ids)
            self._scheduler.add(first)

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

    def _draft(self) -> None:
        """Let the speculator propose tokens for the sequences that are one token short of sampling."""
        if self._speculator is not None:
            seated = self._scheduler.running[: self.config.max_num_seqs]  # nobody else has a turn in the next step
            ready = (s for s in seated if s.max_tokens and s.num_computed == len(s.ids) - 1)
            self._speculator.before(list(ready))

    def _end(self, sequence: Sequence, reason: FinishReason, error: str = "") -> list[Delta]:
        """End a sequence, and with it those that still waited to branch off it."""
        if error == NOT_FINITE:
            self._blocks.forget(sequence.block_table)
        deltas = []
        for ended in (sequence, *sequence.forks):
            deltas.append(ended.finish(reason, error=error))
            self._release(ended)
        return deltas

    def _release(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        if self._speculator is not None:
            self._speculator.release(sequence)
        group = self._requests[sequence.request.request_id]
        if all(s.finished for s in group):
            del self._requests[sequence.request.request_id]
            self._compiling.drop(sequence.request.request_id)
            self._requests_finished += 1


def _stamp(model: Decoder) -> int:
    """Something that changes when a weight is changed in place or replaced."""
    return hash(tuple((id(p), 0 if p.is_inference() else p._version) for p in model.parameters()))
