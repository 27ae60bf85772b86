"""What a caller puts into the engine and gets out of it: parameters, requests, deltas, completions."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from nanoworks.common.errors import UserError

FinishReason = Literal["stop", "length", "cancelled", "error"]

TopLogprobs = list[tuple[int, float]]
"""The most likely (token, logprob) at one position, best first."""


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt.

    Filters apply in the order temperature, top_k, top_p, min_p. The log-probabilities that the engine reports
    are always the model's own, log_softmax(logits) before temperature and filters; at temperature 1 without
    filters they are those of the distribution that was sampled.

    Attributes:
        max_tokens: most output tokens, those forced by a tool included; clipped to what the context leaves.
        temperature: 0 takes the most likely token.
        top_k: keep the k most likely tokens and what ties with the k-th; None keeps all.
        top_p: keep the smallest set of most likely tokens that reaches this probability.
        min_p: drop tokens less likely than this fraction of the most likely one.
        seed: the same seed, prompt and sample index draw the same numbers whatever else is in the batch.
            None is a random seed.
        stop: strings that end the output; the text is cut before the first one.
        stop_ids: token ids that end the output, beside the tokenizer's own.
        logprobs: also report this many most likely tokens at each output position.
        prompt_logprobs: report the log-probability of each prompt token after the first.
        ignore_eos: go on past the tokenizer's end-of-turn tokens; `stop` and `stop_ids` still hold.
        n: number of samples.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: bool = False
    ignore_eos: bool = False
    n: int = 1

    def __post_init__(self) -> None:
        rules = (
            ("max_tokens", self.max_tokens >= 0, "must be 0 or more"),
            ("temperature", 0 <= self.temperature < float("inf"), "must be 0 or more, and finite"),
            ("top_k", self.top_k is None or self.top_k >= 1, "must be 1 or more; None keeps all tokens"),
            ("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "must be from 0 to 1"),
            ("stop", not isinstance(self.stop, str) and all(self.stop), "must be non-empty strings in a tuple"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "must be 0 or more"),
            ("n", self.n >= 1, "must be 1 or more"),
            ("n", self.n == 1 or self.max_tokens > 0, "must be 1 when max_tokens=0"),
        )
        for name, holds, rule in rules:
            if not holds:
                raise UserError(f"{name}={getattr(self, name)!r} {rule}")


@dataclass
class Request:
    """One prompt for the engine.

    `continuations` makes it a scoring request: nothing is sampled; each continuation is read after the one
    shared prompt and the log-probabilities of its tokens are recorded (`Engine.loglikelihood`).
    """

    prompt_ids: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    continuations: Sequence[Sequence[int]] = ()

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
