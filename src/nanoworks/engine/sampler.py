"""From logits to tokens, for a whole batch at once.

Order of operations on a row's logits: repetition penalty; frequency and presence penalties; logit bias; what may not
come now (end tokens before `min_tokens`, what the grammar refuses) is set to -inf; then the most likely token
(temperature 0), or temperature, top_k, top_p, min_p and a draw. The log-probabilities that are reported are the
model's own, before all of this.

Random numbers are counter-based: the one that chooses the t-th token of a sample is a hash of the sample's
seed and t (SplitMix64, https://doi.org/10.1145/2660193.2660195), and the token is looked up in the cumulative
distribution. So a sample does not depend on what else is in the batch, nor on being preempted, and no
generator state has to be kept. All arithmetic is row by row, so the token of a row is a function of that row's logits
to the last bit.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from nanoworks.engine.adjust import Row, adjust
from nanoworks.engine.request import NOT_FINITE, SamplingParams, TopLogprobs
from nanoworks.nn import kernels

_GAMMA = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))

_COLDEST = 1e-6
"""Lower temperatures are taken as this one, which is greedy up to ties; zero itself never divides."""

_FEW = 1024
"""How many of the most likely tokens are sorted first to find top_p's cut: for a trained model nearly always enough,
and a third of the price of sorting a vocabulary of 32,000."""


@dataclass(slots=True)
class Samples:
    """One entry a row. A log-probability that is not finite says that no token could be chosen: the row's logits
    were not finite, or its grammar failed (`errors` says which)."""

    tokens: list[int]
    logprobs: list[float]
    top: list[TopLogprobs | None]
    errors: dict[int, str]
    """Row -> what went wrong, for rows whose log-probability is not finite."""


def sample_seed(seed: int | None, index: int) -> int:
    """Return the 64-bit seed of sample `index` of a request whose seed is `seed` (None: a random one)."""
    start = secrets.randbits(64) if seed is None else seed
    return int(_hash([start % 2**64], [index])[0])


def uniforms(seeds: Sequence[int], steps: Sequence[int]) -> np.ndarray:
    """(R,) float32 numbers in [0, 1), multiples of 2**-24, from each row's seed and step."""
    return (_hash(seeds, steps) >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def _hash(seeds: Sequence[int], steps: Sequence[int]) -> np.ndarray:
    """Output number `step` of the SplitMix64 generator started with `seed`, as uint64."""
    x = np.array(seeds, dtype=np.uint64) + (np.array(steps, dtype=np.uint64) + np.uint64(1)) * np.uint64(_GAMMA)
    for shift, factor in _MIX:
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


def sample(logits: Tensor, rows: Sequence[Row], *, vocab_size: int) -> Samples:
    """Choose the next token of each row of `logits` (R, V) float32, which are left as they are.

    Only the first `vocab_size` tokens are chosen from: a model may be padded beyond what its tokenizer can decode.
    """
    best, log_total = _stats(logits, vocab_size)
    errors: dict[int, str] = {}
    if all(row.params.keeps_logits for row in rows):
        tokens = _choose(logits[:, :vocab_size], rows, best)
    else:
        adjusted, errors = adjust(logits[:, :vocab_size], rows)
        tokens = _choose(adjusted, rows, None)
        for i, row in enumerate(rows):
            if row.grammar is not None and i not in errors:
                tokens[i] = row.grammar.fit(int(tokens[i]), row.drafted, row.remaining)

    chosen = (logits.gather(-1, tokens[:, None]).squeeze(-1) - log_total).tolist()
    for i, logprob in enumerate(chosen):
        if i in errors:
            chosen[i] = float("nan")
        elif logprob != logprob:
            errors[i] = NOT_FINITE
    top = _top(logits[:, :vocab_size], log_total, [row.params.logprobs for row in rows])
    return Samples(tokens.tolist(), chosen, top, errors)


def score(logits: Tensor, targets: Sequence[int]) -> tuple[list[float], list[bool]]:
    """Return for each row of `logits` (R, V) the log-probability of its target, and whether it is the argmax."""
    best, log_total = _stats(logits, logits.size(-1))
    wanted = torch.tensor(targets, device=logits.device)
    logprobs = logits.gather(-1, wanted[:, None]).squeeze(-1) - log_total
    return logprobs.tolist(), (best == wanted).tolist()


def top(logits: Tensor, counts: Sequence[int], *, vocab_size: int) -> list[TopLogprobs]:
    """Return for each row of `logits` (R, V) its `counts[i]` most likely tokens of the first `vocab_size`."""
    if not any(counts):
        return [[] for _ in counts]
    _, log_total = _stats(logits, vocab_size)
    return [found or [] for found in _top(logits[:, :vocab_size], log_total, counts)]


def _stats(logits: Tensor, choices: int) -> tuple[Tensor, Tensor]:
    """(R,) the first of the largest among the first `choices`, and (R,) logsumexp of each row, NaN where the logits are
    not finite."""
    if logits.device.type == "cpu" and kernels.available():
        return torch.ops.nanoworks.row_stats(logits.float().contiguous(), choices)
    # softmax is torch's fastest kernel that holds the sum: the largest probability is 1 / sum(exp(logits - largest)).
    return _argmax(logits[:, :choices]), logits.amax(-1) - logits.softmax(-1).amax(-1).log()


def _argmax(logits: Tensor) -> Tensor:
    """(R,) the first of the largest. On a CPU by NumPy, ten times faster than torch."""
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(-1)


def _choose(logits: Tensor, rows: Sequence[Row], best: Tensor | None) -> Tensor:
    """(R,) the next tokens; `best` is the likeliest of each row, if that is known."""
    drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    if not drawn:
        return _argmax(logits) if best is None else best
    u = torch.from_numpy(uniforms([rows[i].seed for i in drawn], [rows[i].step for i in drawn])).to(logits.device)
    params = [rows[i].params for i in drawn]
    if len(drawn) == len(rows):
        return _draw(logits, params, u)
    tokens = _argmax(logits) if best is None else best
    index = torch.tensor(drawn, device=logits.device)
    tokens[index] = _draw(logits[index], params, u)
    return tokens


def probabilities(logits: Tensor, rows: Sequence[Row], *, vocab_size: int) -> Tensor:
    """(R, vocab_size) what `sample` draws the rows' tokens by: after penalties, masks, temperature and filters."""
    adjusted, _ = adjust(logits[:, :vocab_size], rows)
    weights = _weights(adjusted, [row.params for row in rows])
    return weights / weights.sum(-1, keepdim=True)


def _draw(logits: Tensor, params: Sequence[SamplingParams], u: Tensor) -> Tensor:
    """Draw a token of each row by inverting the cumulative distribution at `u` (R,)."""
    weights = _weights(logits, params)
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1]
    # Below the total even after rounding, so that the token found always has a weight.
    at = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    found = torch.searchsorted(cumulative, at[:, None], right=True).squeeze(-1)
    return found.clamp_max(logits.size(-1) - 1)  # a row that is not finite finds nothing; its logprob tells


def _weights(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """(R, V) probabilities at each row's temperature, zero for what its filters drop."""
    temperature = _column([max(p.temperature, _COLDEST) for p in params], logits)
    weights = (logits / temperature).softmax(-1)
    if any(p.top_k is not None or p.top_p < 1 or p.min_p > 0 for p in params):
        least = _smallest_kept(weights, params)
        below = torch.nextafter(least, torch.zeros_like(least)).squeeze(-1)
        for row, bound in zip(weights, below.tolist(), strict=True):
            functional.threshold(row, bound, 0.0, inplace=True)  # ten times faster than a mask of all rows
    return weights


def _smallest_kept(weights: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """(R, 1) weight of the least likely token that passes top_k, top_p and min_p."""
    least = _column([p.min_p for p in params], weights) * weights.amax(-1, keepdim=True)
    cut = [i for i, p in enumerate(params) if p.top_k is not None or p.top_p < 1]
    if len(cut) == len(params):
        return torch.maximum(least, _cut(weights, params, _FEW))
    if cut:
        index = torch.tensor(cut, device=weights.device)
        least[index] = torch.maximum(least[index], _cut(weights[index], [params[i] for i in cut], _FEW))
    return least


def _cut(weights: Tensor, params: Sequence[SamplingParams], width: int) -> Tensor:
    """(R, 1) weight of the least likely token that passes top_k and top_p; at least `width` candidates are sorted."""
    size = weights.size(-1)
    width = min(size, max(width, *(p.top_k or 1 for p in params)))
    ordered = _largest(weights, width)
    cumulative = ordered.cumsum(-1)
    top_k = torch.tensor([[min(p.top_k or size, size)] for p in params], device=weights.device)
    # top_p is a share of what top_k leaves. Infinite for top_p=1, so that rounding does not drop the tail.
    left = cumulative.gather(-1, top_k.clamp_max(width) - 1)
    left[top_k == size] = 1.0
    top_p = _column([p.top_p if p.top_p < 1 else float("inf") for p in params], weights)
    kept = torch.minimum(top_k, torch.searchsorted(cumulative, top_p * left) + 1)
    least = ordered.gather(-1, kept.clamp_max(width) - 1)
    beyond = [i for i, (count,) in enumerate(kept.tolist()) if count > width] if width < size else []
    if beyond:  # a flat distribution: the cut may lie behind the candidates
        index = torch.tensor(beyond, device=weights.device)
        least[index] = _cut(weights[index], [params[i] for i in beyond], size)
    return least


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _largest(weights: Tensor, count: int) -> Tensor:
    """(R, count) the largest of each row in falling order. On a CPU by NumPy, whose selection and sort of bare floats
    are vectorised: many times faster than torch's."""
    if weights.device.type == "cpu":
        falling = np.negative(weights.numpy())
        if count < falling.shape[-1]:
            falling.partition(count, axis=-1)
            falling = falling[:, :count].copy()
        falling.sort(axis=-1)
        return torch.from_numpy(np.negative(falling, out=falling))
    return weights.topk(count).values


def _top(logits: Tensor, log_total: Tensor, counts: Sequence[int | None]) -> list[TopLogprobs | None]:
    asking = [i for i, count in enumerate(counts) if count]
    result: list[TopLogprobs | None] = [None] * len(counts)
    if asking:
        index = torch.tensor(asking, device=logits.device)
        most = min(max(counts[i] or 0 for i in asking), logits.size(-1))
        values, ids = logits[index].topk(most)
        values -= log_total[index, None]
        for i, v, t in zip(asking, values.tolist(), ids.tolist(), strict=True):
            result[i] = list(zip(t, v, strict=True))[: counts[i]]
    return result
