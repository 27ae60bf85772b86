"""What is asked of the server: how many requests, how long, how often."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from nanoworks.common.errors import UserError

# Of four letters each and common, so that most tokenizers need the same number of tokens for any of them.
_WORDS = (
    "also area away baby back ball band bank base bear beat bird blue boat body book born both call came camp card "
    "care city club cold come cook copy cost dark data date days deal deep door down draw east edge even ever face "
    "fact fair fall farm fast feel feet felt fire fish five food foot form four free full game gave girl give goes "
    "gold gone good half hall hand hard have head hear heat help here high hold home hope hour idea into jack keep"
)
WORDS = _WORDS.split()


@dataclass(frozen=True)
class Lengths:
    """A distribution of lengths in tokens, all within `low` and `high`."""

    kind: Literal["fixed", "uniform", "lognormal"]
    low: int
    high: int
    median: int = 0
    sigma: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Read `128` (always), `64-256` (evenly between), or `128~0.5` (log-normal: median and sigma).

        Raises:
            UserError: it is none of these.
        """
        try:
            if "~" in text:
                median, sigma = text.split("~")
                made = cls("lognormal", 1, 16 * int(median), int(median), float(sigma))
            elif "-" in text:
                low, high = map(int, text.split("-"))
                made = cls("uniform", low, high)
            else:
                made = cls("fixed", int(text), int(text))
        except ValueError:
            raise UserError(f"{text!r} is no length; write 128, 64-256 or 128~0.5 (median~sigma)") from None
        if not 1 <= made.low <= made.high or made.sigma < 0:
            raise UserError(f"{text!r} is no range of lengths; begin at 1 or more and end no lower")
        return made

    def draw(self, rng: random.Random) -> int:
        if self.kind == "lognormal":
            return max(self.low, min(self.high, round(self.median * rng.lognormvariate(0, self.sigma))))
        return rng.randint(self.low, self.high)


@dataclass(frozen=True)
class Load:
    """One run against one server.

    Args:
        url: of the server, without /v1.
        endpoint: which of OpenAI's.
        requests: how many in all.
        concurrency: so many at a time, the next when one ends; None with `rate`.
        rate: so many a second on average, at the random times of independent users (Poisson), however slow the
            server is; None with `concurrency`.
        exact_output: ask for exactly the drawn number of tokens (`min_tokens`, which not every server knows).
        temperature: None leaves it to the server.
        seed: of lengths, words and arrival times. A second run with one seed finds its prompts in the prefix cache.
    """

    url: str
    model: str
    endpoint: Literal["chat", "completions"] = "chat"
    requests: int = 200
    concurrency: int | None = 16
    rate: float | None = None
    prompt_tokens: Lengths = Lengths("fixed", 128, 128)
    output_tokens: Lengths = Lengths("fixed", 64, 64)
    exact_output: bool = True
    temperature: float | None = None
    api_key: str = ""
    seed: int = 0
    timeout: float = 600.0
    """Seconds that one request may take."""

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.rate is None):
            raise UserError("give either a concurrency or a rate")

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


@dataclass(frozen=True)
class Calibration:
    """How many tokens the server counts in a prompt: `base + per_word * words`."""

    base: float
    per_word: float

    def words(self, tokens: int) -> int:
        """Number of words for a prompt of about `tokens`; at least one."""
        return max(1, round((tokens - self.base) / self.per_word))


@dataclass(frozen=True)
class Question:
    """One request to send: `at` seconds after the start, or when there is a place."""

    prompt: str
    output_tokens: int
    at: float = 0.0


def text(rng: random.Random, words: int) -> str:
    """Random words: no two prompts begin alike, so the server's prefix cache finds nothing in them."""
    return " ".join(rng.choices(WORDS, k=words))


def questions(load: Load, calibration: Calibration) -> list[Question]:
    """Draw all requests of `load`, in the order in which they are sent."""
    rng, clock = random.Random(load.seed), random.Random(f"{load.seed}: arrivals")
    drawn, at = [], 0.0
    for _ in range(load.requests):
        if load.rate is not None:
            at += clock.expovariate(load.rate)
        prompt = text(rng, calibration.words(load.prompt_tokens.draw(rng)))
        drawn.append(Question(prompt, load.output_tokens.draw(rng), at))
    return drawn
