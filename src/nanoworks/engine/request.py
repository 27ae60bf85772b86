"""What a caller puts into the engine and gets out of it: parameters, requests, deltas, completions."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from nanoworks.common.errors import UserError
from nanoworks.engine.grammar import Grammar

FinishReason = Literal["stop", "length", "cancelled", "error"]

TopLogprobs = list[tuple[int, float]]
"""The most likely (token, logprob) at one position, best first."""

NOT_FINITE = "the model's logits are not finite"
"""The `error` of a request whose logits held NaN or infinity."""

MAX_SAMPLES = 1024
MAX_STOPS, MAX_STOP_LENGTH, MAX_STOP_IDS = 16, 4096, 1024


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt.

    Logits are changed in the order repetition_penalty, frequency_penalty and presence_penalty, logit_bias, what
    min_tokens and grammar forbid, temperature, top_k, top_p, min_p. The log-probabilities that the engine reports
    are always the model's own, log_softmax(logits) before all of that; at temperature 1 without anything else they
    are those of the distribution that was sampled.

    Attributes:
        max_tokens: most output tokens, those forced by a tool included; clipped to what the context leaves.
        temperature: 0 takes the most likely token.
        top_k: keep the k most likely tokens and what ties with the k-th; None keeps all.
        top_p: keep the smallest set of most likely tokens that reaches this probability.
        min_p: drop tokens less likely than this fraction of the most likely one.
        repetition_penalty: tokens of the prompt and the output have positive logits divided and negative ones
            multiplied by it; above 1 makes them rarer.
        frequency_penalty: is taken from a token's logit for every time it is in the output.
        presence_penalty: is taken once from the logit of a token that is in the output.
        logit_bias: token id -> what is added to its logit; -100 forbids it in practice.
        min_tokens: no end token and no stop string counts before so many output tokens; a grammar that can only end
            wins over it.
        seed: the same seed, prompt and sample index draw the same numbers whatever else is in the batch.
            None is a random seed.
        stop: strings that end the output; the text is cut before the first one.
        stop_ids: token ids that end the output, beside the tokenizer's own.
        logprobs: also report this many most likely tokens at each output position.
        prompt_logprobs: report the log-probability of each prompt token after the first.
        ignore_eos: go on past the tokenizer's end-of-turn tokens; `stop` and `stop_ids` still hold.
        n: number of samples.
        grammar: what the output must be; not together with `stop`, which would cut it.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    min_tokens: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: bool = False
    ignore_eos: bool = False
    n: int = 1
    grammar: Grammar | None = None

    @cached_property
    def keeps_logits(self) -> bool:
        """Whether tokens are chosen by the model's own logits: no penalty, bias, minimum or grammar."""
        penalties = self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0
        return not (penalties or self.logit_bias or self.min_tokens or self.grammar is not None)

    def __post_init__(self) -> None:
        finite = math.isfinite
        rules = (
            ("max_tokens", self.max_tokens >= 0, "must be 0 or more"),
            ("temperature", 0 <= self.temperature < math.inf, "must be 0 or more, and finite"),
            ("top_k", self.top_k is None or self.top_k >= 1, "must be 1 or more; None keeps all tokens"),
            ("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "must be from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "must be above 0, and finite"),
            ("frequency_penalty", finite(self.frequency_penalty), "must be finite"),
            ("presence_penalty", finite(self.presence_penalty), "must be finite"),
            ("logit_bias", all(finite(b) for b in self.logit_bias.values()), "must be finite numbers; -100 forbids"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, f"must be from 0 to max_tokens={self.max_tokens}"),
            ("stop", not isinstance(self.stop, str) and all(self.stop), "must be non-empty strings in a tuple"),
            ("stop", len(self.stop) <= MAX_STOPS, f"must be at most {MAX_STOPS} strings"),
            (
                "stop",
                sum(map(len, self.stop)) <= MAX_STOP_LENGTH,
                f"must be {MAX_STOP_LENGTH} characters at most",
            ),
            ("stop", not (self.stop and self.grammar), "would cut the output of a grammar; leave one of them out"),
            ("stop_ids", len(self.stop_ids) <= MAX_STOP_IDS, f"must be at most {MAX_STOP_IDS} ids"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "must be 0 or more"),
            ("n", 1 <= self.n <= MAX_SAMPLES, f"must be from 1 to {MAX_SAMPLES}"),
            ("n", self.n == 1 or self.max_tokens > 0, "must be 1 when max_tokens=0"),
        )
        for name, holds, rule in rules:
            if not holds:
                shown = repr(getattr(self, name))
                raise UserError(f"{name}={shown if len(shown) <= 100 else shown[:97] + '...'} {rule}")


@dataclass
class Request:
    """One prompt for the engine.

    `continuations` makes it a scoring request: nothing is sampled; each continuation is read after the one
    shared prompt and the log-probabilities of its tokens are recorded (`Engine.loglikelihood`).
    A waiting request of higher `priority` goes first; those of one priority take turns by `client`, a name that
    the caller chooses (a user, an API key), so that one client's many requests do not starve another's.
    `pooling` "mean" makes it an embedding: nothing is sampled (`max_tokens=0`), and the only delta has the mean of the
    prompt's hidden states after the final norm.
    Cached prefixes are shared only between requests of one `cache_salt`: a secret here keeps others from finding out by
    the time it takes whether a prompt was sent before.
    """

    prompt_ids: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    continuations: Sequence[Sequence[int]] = ()
    priority: int = 0
    client: str = ""
    cache_salt: str = ""
    pooling: Literal["mean"] | None = None
    arrival: float = field(default_factory=time.perf_counter)
    """When it was made, in seconds of `time.perf_counter`."""

    @property
    def num_sequences(self) -> int:
        return len(self.continuations) or self.params.n


@dataclass(slots=True)
class Completion:
    """One sample. `token_ids`, `logprobs` and `mask` have one entry a token.

    A token that ended the output is kept in `token_ids` (training needs it) and not in `text`. `mask` is 1 for
    a sampled token and 0 for one that a tool forced, whose log-probability is given as 0.
    """

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str = ""
    """What went wrong, when the reason is "error"."""
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    """One entry a token when `SamplingParams.logprobs` asks for it, else empty; [] for a forced token."""
    prompt_logprobs: list[float] = field(default_factory=list)
    """When asked for: entry i is the log-probability of prompt token i + 1."""


@dataclass(slots=True)
class Delta:
    """What one step added to one sample; fields as in `Completion`.

    `text` never ends inside a UTF-8 character or in what may become a stop string, so it may lag behind
    `token_ids`. The last delta of a sample has a `finish_reason`.
    """

    request_id: str
    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str = ""
    embedding: list[float] = field(default_factory=list)
    """(hidden_size,) of a request with `pooling`."""
    queue_seconds: float | None = None
    """In the first delta of a request's sample 0: from its arrival to its first step."""
    cached_tokens: int = 0
    """In the same delta: how many tokens of the prompt were found in the prefix cache."""
    prompt_logprobs: list[float] = field(default_factory=list)
    """In the first delta of sample 0, when asked for: entry i is the log-probability of prompt token i + 1."""
    prompt_top_logprobs: list[TopLogprobs] = field(default_factory=list)
    """Beside them, `SamplingParams.logprobs` most likely tokens at each of these positions."""


@dataclass(frozen=True)
class Loglikelihood:
    """Log-probability of a continuation: `sum`, each of its `tokens`, and whether greedy decoding gives it."""

    sum: float
    tokens: list[float]
    greedy: bool


@dataclass(frozen=True)
class EngineStats:
    """Gauges of this moment and counters since the start."""

    running: int
    waiting: int
    blocks_used: int
    blocks_total: int
    steps: int
    tokens_computed: int
    """Tokens that went through the model, prompts and recomputation included."""
    tokens_generated: int
    requests_finished: int
    preemptions: int
    blocks_cached: int
    """Blocks that can be found by the tokens they hold, in use or not."""
    prefix_queries: int
    """Tokens of prompts for which the cache was asked, recomputation included."""
    prefix_hits: int
    """Prompt tokens that were found in the cache instead of computed, recomputation included."""
    drafted: int
    """Tokens that speculation guessed and the model verified."""
    draft_accepted: int
    """Those of them that were right."""
    kv_waste: float
    """Share of the token slots in used blocks that held no token before the last step: what paging loses."""
    kv_waste_mean: float
    """The same over all steps, each weighted by the slots it held."""
    kv_waste_peak: float


class QueueFull(UserError):
    """The server has as many waiting requests as it takes."""

    def __init__(self, waiting: int, limit: int) -> None:
        super().__init__(f"{waiting} requests wait already and the limit is {limit}; try again later")
        self.waiting, self.limit = waiting, limit
