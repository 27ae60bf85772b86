"""From logits to tokens, for a whole batch at once.

Random numbers are counter-based: the one that chooses the t-th token of a sample is a hash of the sample's
seed and t (SplitMix64, https://doi.org/10.1145/2660193.2660195), and the token is looked up in the cumulative
distribution. So a sample does not depend on what else is in the batch, nor on being preempted, and no
generator state has to be kept.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanoworks.engine.request import SamplingParams, TopLogprobs

_GAMMA = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))

_COLDEST = 1e-6
"""Lower temperatures are taken as this one, which is greedy up to ties; zero itself never divides."""


@dataclass(slots=True)
class Samples:
    """One entry a row. A log-probability that is not finite says that the row's logits were not."""

    tokens: list[int]
    logprobs: list[float]
    top: list[TopLogprobs | None]


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


def sample(
    logits: Tensor,
    params: Sequence[SamplingParams],
    seeds: Sequence[int],
    steps: Sequence[int],
    *,
    vocab_size: int,
) -> Samples:
    """Choose the next token of each row of `logits` (R, V) float32.

    `steps` counts the tokens each row has already had; with `seeds` it fixes the random numbers. Only the first
    `vocab_size` tokens are chosen from: a model may be padded beyond what its tokenizer can decode.
    """
    logprobs = logits.log_softmax(-1)
    logits = logits[:, :vocab_size]
    drawn = [i for i, p in enumerate(params) if p.temperature > 0]
    if len(drawn) < len(params):
        tokens = logits.argmax(-1)
    else:
        tokens = torch.empty(len(params), dtype=torch.long, device=logits.device)
    if drawn:
        u = uniforms([seeds[i] for i in drawn], [steps[i] for i in drawn])
        rows = torch.tensor(drawn, device=logits.device)
        tokens[rows] = _draw(logits[rows], [params[i] for i in drawn], torch.from_numpy(u).to(logits.device))
    chosen = logprobs.gather(-1, tokens[:, None]).squeeze(-1)
    return Samples(tokens.tolist(), chosen.tolist(), _top(logprobs[:, :vocab_size], params))


def score(logits: Tensor, targets: Sequence[int]) -> tuple[list[float], list[bool]]:
    """Return for each row of `logits` (R, V) the log-probability of its target, and whether it is the argmax."""
    wanted = torch.tensor(targets, device=logits.device)
    logprobs = logits.gather(-1, wanted[:, None]).squeeze(-1) - logits.logsumexp(-1)
    return logprobs.tolist(), (logits.argmax(-1) == wanted).tolist()


def _draw(logits: Tensor, params: Sequence[SamplingParams], u: Tensor) -> Tensor:
    """Draw a token of each row by inverting the cumulative distribution at `u` (R,)."""
    temperature = _column([max(p.temperature, _COLDEST) for p in params], logits)
    weights = (logits / temperature).softmax(-1)
    if any(p.top_k is not None or p.top_p < 1 or p.min_p > 0 for p in params):
        weights = weights * (weights >= _smallest_kept(weights, params))
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1]
    # Below the total even after rounding, so that the token found always has a weight.
    at = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    found = torch.searchsorted(cumulative, at[:, None], right=True).squeeze(-1)
    return found.clamp_max(logits.size(-1) - 1)  # a row that is not finite finds nothing; its logprob tells


def _smallest_kept(weights: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """(R, 1) weight of the least likely token that passes top_k, top_p and min_p."""
    size = weights.size(-1)
    ordered = _descending(weights)
    top_k = torch.tensor([[min(p.top_k or size, size)] for p in params], device=weights.device)
    # Infinite for top_p=1, so that rounding does not drop the tail.
    top_p = _column([p.top_p if p.top_p < 1 else float("inf") for p in params], weights)
    min_p = _column([p.min_p for p in params], weights)
    cumulative = ordered.cumsum(-1)
    nucleus = (cumulative - ordered < top_p * cumulative.gather(-1, top_k - 1)).sum(-1, keepdim=True)
    last = torch.minimum(top_k, nucleus).clamp_min(1) - 1
    return torch.maximum(ordered.gather(-1, last), min_p * ordered[:, :1])


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _descending(weights: Tensor) -> Tensor:
    """Sort each row. On a CPU by NumPy, whose sort of bare floats is vectorised: 50 times faster than torch's."""
    if weights.device.type == "cpu":
        return torch.from_numpy(np.sort(weights.numpy(), axis=-1)).flip(-1)
    return weights.sort(-1, descending=True).values


def _top(logprobs: Tensor, params: Sequence[SamplingParams]) -> list[TopLogprobs | None]:
    most = min(max(p.logprobs or 0 for p in params), logprobs.size(-1))
    if most == 0:
        return [None] * len(params)
    values, ids = logprobs.topk(most)
    rows = zip(ids.tolist(), values.tolist(), params, strict=True)
    return [list(zip(i, v, strict=True))[: p.logprobs] if p.logprobs else None for i, v, p in rows]
