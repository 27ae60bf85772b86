"""One sample of a request while it is in the engine: the unit that is scheduled.

A sequence that reads its prompt, one that generates, one that reads tokens a tool forced on it and one that
was preempted are all the same thing: `ids[num_computed:num_to_compute]` is not in the cache yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from nanoworks.engine.block_manager import BlockTable
from nanoworks.engine.guidance import GrammarState
from nanoworks.engine.history import History
from nanoworks.engine.request import Completion, Delta, FinishReason, Request, TopLogprobs
from nanoworks.engine.text import TextStream
from nanoworks.engine.tools import Calculator


@dataclass(slots=True)
class Draft:
    """Tokens proposed to follow `sequence.ids`: a chain, or a tree of alternatives.

    `parents[i]` is the index in `tokens` of the token before token i, -1 for the last known token; it is less than
    i. A chain has the parents -1, 0, 1, ...
    """

    tokens: list[int]
    parents: list[int]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def depths(self) -> list[int]:
        """How many tokens lie between each token and the last known one."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return depths

    @property
    def paths(self) -> list[tuple[int, ...]]:
        """For each token those from the root to itself."""
        paths: list[tuple[int, ...]] = []
        for token, parent in zip(self.tokens, self.parents, strict=True):
            paths.append((*(paths[parent] if parent >= 0 else ()), token))
        return paths

    def first(self, num_tokens: int) -> Draft:
        """Return the draft of the first `num_tokens` tokens, which is whole because parents come first."""
        return Draft(self.tokens[:num_tokens], self.parents[:num_tokens])


class Rank(NamedTuple):
    """Order among the sequences of an engine: who is served first, and keeps its blocks when they run out."""

    due: int
    """The step at which it came, a level of priority counted as some steps earlier (see `fairness`)."""
    arrival: int
    sample: int


class Sequence:
    """Args:
    max_tokens: output tokens at most, 0 for a sequence that only scores known tokens.
    stop_ids: tokens that end the output.
    seed: of this sample (see `sampler`).
    text, tool: None without a tokenizer, without tools.
    """

    __slots__ = (
        "block_table",
        "completion",
        "draft",
        "forks",
        "grammar",
        "greedy",
        "hidden",
        "history",
        "ids",
        "index",
        "max_tokens",
        "num_cached",
        "num_computed",
        "rank",
        "request",
        "score_from",
        "score_tops",
        "score_until",
        "scores",
        "seed",
        "started",
        "stop_ids",
        "text",
        "tool",
    )

    def __init__(
        self,
        request: Request,
        index: int,
        *,
        max_tokens: int,
        stop_ids: frozenset[int],
        seed: int,
        text: TextStream | None,
        tool: Calculator | None,
    ) -> None:
        self.request, self.index = request, index
        self.max_tokens, self.stop_ids, self.seed = max_tokens, stop_ids, seed
        self.text, self.tool = text, tool
        self.ids = list(request.prompt_ids)
        self.num_computed = 0
        self.rank = Rank(0, 0, index)  # the scheduler's
        self.block_table: BlockTable = {}
        self.completion = Completion()
        self.grammar: GrammarState | None = None
        self.history: History | None = None  # made when penalties ask for it
        self.draft: Draft | None = None  # for the next step; set before `schedule`, which takes it
        # Of the row that the newest token was sampled from, if a proposer needs it; the sum of all with `pooling`.
        self.hidden: Tensor | None = None
        self.started: float | None = None  # when it had its first turn, in seconds of time.perf_counter
        self.num_cached = 0  # prompt tokens that were found in the prefix cache then
        # Samples 1.. of the request hang here on sample 0 until it has read the prompt for them.
        self.forks: list[Sequence] = []
        # ids[score_from:score_until] are known tokens whose log-probabilities are asked for.
        self.score_from = 1 if request.params.prompt_logprobs and index == 0 else self.prompt_length
        if request.continuations:
            self.score_from = self.prompt_length
            self.ids += request.continuations[index]
        self.score_until = len(self.ids)
        self.scores: list[float] = []
        self.score_tops: list[TopLogprobs] = []
        self.greedy = True  # whether every scored token so far was the most likely one

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_to_compute(self) -> int:
        """Tokens that must pass through the model: the last one only if its own row is needed."""
        return len(self.ids) if self.max_tokens or self.request.pooling else self.score_until - 1

    @property
    def next_score(self) -> int:
        """Index of the first token still to be scored; `score_until` when none is left."""
        return self.score_from + len(self.scores)

    @property
    def finished(self) -> bool:
        return self.completion.finish_reason is not None

    def append(self, token: int, logprob: float, top: TopLogprobs | None) -> Delta:
        """Take a sampled token with what follows from it: tool output, text, the end."""
        output = self.completion
        tokens = [token]
        reason: FinishReason | None = None
        if token in self.stop_ids:
            reason = "stop"
        elif self.tool is not None:
            room = self.max_tokens - len(output.token_ids) - 1
            tokens += self.tool.observe(token)[:room]
        forced = len(tokens) - 1
        delta = Delta(
            self.request.request_id,
            self.index,
            token_ids=tokens,
            logprobs=[logprob] + [0.0] * forced,
            mask=[1] + [0] * forced,
            top_logprobs=[] if top is None else [top] + [[]] * forced,
        )
        if not output.token_ids:
            self._begin(delta)
        self.ids += tokens
        output.token_ids += tokens
        output.logprobs += delta.logprobs
        output.mask += delta.mask
        output.top_logprobs += delta.top_logprobs
        if reason is None and self.text is not None:
            may_stop = len(output.token_ids) >= self.request.params.min_tokens
            delta.text = self.text.push(tokens, may_stop=may_stop)
            output.text += delta.text
            if self.text.stopped:
                reason = "stop"
        if self.grammar is not None:
            self.grammar.follow(output.token_ids)
            if reason is None and self.grammar.finished:
                reason = "stop"
        if reason is None and len(output.token_ids) >= self.max_tokens:
            reason = "length"
        return delta if reason is None else self.finish(reason, delta)

    def finish(self, reason: FinishReason, delta: Delta | None = None, *, error: str = "") -> Delta:
        """End the sample; returns its last delta, `delta` completed if given. `error` says why it failed."""
        if delta is None:
            delta = Delta(self.request.request_id, self.index)
            if not self.completion.token_ids:
                self._begin(delta)
        self.completion.error = delta.error = error
        if self.text is not None:
            rest = self.text.flush()
            delta.text += rest
            self.completion.text += rest
        self.completion.prompt_logprobs = self.scores if self.request.params.prompt_logprobs else []
        self.completion.finish_reason = delta.finish_reason = reason
        return delta

    def _begin(self, delta: Delta) -> None:
        """Put into the first delta what is told once."""
        if self.started is not None:  # None: it never had a turn, or branched off another
            delta.queue_seconds = self.started - self.request.arrival
            delta.cached_tokens = self.num_cached
        if self.request.params.prompt_logprobs:
            delta.prompt_logprobs, delta.prompt_top_logprobs = self.scores, self.score_tops
