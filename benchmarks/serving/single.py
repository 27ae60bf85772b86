"""Rows that compare our engine with itself: shared prefix, n-gram speculation, waste of the KV cache.

    python benchmarks/serving/single.py [prefix speculation waste] [--size 120m] [--precision bf16] [--rounds 5]

Both sides of a row live in one process over one model and take turns within each round; the ratio is the median over
the rounds.

`prefix`: 32 requests that share their first 1,000 tokens, 16 of their own each, 16 new tokens, with the prefix
cache and without. `speculation`: n-gram drafts against plain decoding, one request and 16. The copy-heavy task is
a model that was made to continue a given cycle of tokens, and a prompt that holds this cycle with every 12th token
exchanged, so that the output repeats the prompt with a few changes, as an edited document does; its matrices have
the usual sizes and cost the usual time. The random task is the random model sampled at temperature 1, where
nothing repeats. `waste`: share of the slots in used KV blocks that held no token, over the mixed requests.
"""

from __future__ import annotations

import argparse
import random
import time
from statistics import median
from typing import Any

import torch
import toy_models
from workload import MIXED, NEW, SIZES, VOCAB, prompts

from nanoworks.checkpoint import load_checkpoint
from nanoworks.common.allocator import keep_freed_memory
from nanoworks.engine import Engine, EngineConfig, SamplingParams
from nanoworks.models import Decoder

SHARED, REQUESTS, OWN = 1000, 32, 16
DOCUMENT, CHANGED = 120, 12


def build(size: str, precision: str, *, copies: bool = False, **config: Any) -> Engine:
    if precision != "bf16":
        config["quantize"] = precision
    checkpoint = load_checkpoint(toy_models.model_for("nanoworks", precision, size), dtype=torch.bfloat16)
    if copies:
        make_it_cycle(checkpoint.model)
    return Engine(checkpoint.model, None, EngineConfig(kv_memory=1.0, **config))


@torch.no_grad()
def make_it_cycle(model: Decoder) -> None:
    """Change `model` so that token t of the cycle is followed by t + 1: every layer adds zero, and the row of a
    token in the last matrix is the embedding of the one before it."""
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.zero_()
    model.head.lm_head.weight.copy_(model.embed_tokens.weight.roll(1, 0) * 50)


def run(engine: Engine, asked: list[list[int]], params: SamplingParams) -> tuple[float, list[list[int]]]:
    """Return seconds and the tokens of each request."""
    started = time.perf_counter()
    outputs = [c.token_ids for [c] in engine.generate(asked, params)]
    return time.perf_counter() - started, outputs


def prefix(options: argparse.Namespace) -> None:
    sides = {on: build(options.size, options.precision, prefix_caching=on) for on in (True, False)}
    params = SamplingParams(max_tokens=options.new or 16, temperature=0, ignore_eos=True)
    ratios, times = [], []
    for number in range(options.rounds + 1):
        rng = random.Random(number)
        [shared] = prompts(rng, [SHARED])
        asked = [shared + own for own in prompts(rng, [OWN] * REQUESTS)]
        seconds = {}
        for on in (True, False) if number % 2 else (False, True):
            seconds[on], _ = run(sides[on], asked, params)
        if number:  # the first round warms up
            ratios.append(seconds[False] / seconds[True])
            times.append(seconds)
    with_, without = (median(t[on] for t in times) for on in (True, False))
    print(
        f"prefix {options.size} {options.precision}: {REQUESTS} requests of {SHARED} shared and {OWN} own tokens, "
        f"{params.max_tokens} new: {without:.2f} s without the cache, {with_:.2f} s with it, "
        f"ratio {median(ratios):.2f} (goal 5)"
    )


def copy_task(rng: random.Random) -> list[int]:
    """A prompt that holds twice the piece of the cycle which its continuation will be, with changed tokens."""
    start = rng.randrange(300, VOCAB - 4 * DOCUMENT)
    document = [rng.randrange(300, VOCAB) if i % CHANGED == CHANGED - 1 else start + i for i in range(DOCUMENT)]
    return [*document, start]


def speculation(options: argparse.Namespace) -> None:
    new = options.new or NEW
    for copies in (True, False):
        sides = {s: build(options.size, options.precision, copies=copies, speculate=s) for s in ("ngram", "none")}
        for width in (1, 16):
            ratios, rates = [], []
            for number in range(options.rounds + 1):
                rng = random.Random(number)
                asked = [copy_task(rng) if copies else prompts(rng, [DOCUMENT])[0] for _ in range(width)]
                greedy = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
                params = greedy if copies else SamplingParams(max_tokens=new, seed=number, ignore_eos=True)
                seconds, outputs = {}, {}
                for side in ("ngram", "none") if number % 2 else ("none", "ngram"):
                    seconds[side], outputs[side] = run(sides[side], asked, params)
                same = sum(a == b for a, b in zip(outputs["ngram"], outputs["none"], strict=True))
                if number:
                    ratios.append(seconds["none"] / seconds["ngram"])
                    rates.append({side: width * new / s for side, s in seconds.items()})
            task = "copy-heavy" if copies else "random"
            print(
                f"speculation {options.size} {options.precision}, {task}, {width} at once: plain "
                f"{median(r['none'] for r in rates):.0f} tok/s, n-gram {median(r['ngram'] for r in rates):.0f}, ratio "
                f"{median(ratios):.2f} (goal {'1.5' if copies else 'not below 0.95'}); last round: {same} of {width} "
                "outputs the same",
                flush=True,
            )


def waste(options: argparse.Namespace) -> None:
    engine = build(options.size, options.precision)
    rng = random.Random(0)
    each = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for _, n in MIXED]
    engine.generate(prompts(rng, [p for p, _ in MIXED]), each)
    stats = engine.stats()
    print(
        f"KV waste {options.size}, 16 mixed requests, blocks of {engine.config.block_size}: "
        f"mean {100 * stats.kv_waste_mean:.1f}%, peak {100 * stats.kv_waste_peak:.1f}% (goal: mean below 4%)"
    )


def main() -> None:
    jobs = {"prefix": prefix, "speculation": speculation, "waste": waste}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", default=list(jobs), choices=[*jobs, []], help="default: all")
    parser.add_argument("--size", choices=list(SIZES), default="120m")
    parser.add_argument("--precision", choices=["bf16", "int8", "int4"], default="bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new", type=int, help="new tokens of a request")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    for job in options.jobs:
        jobs[job](options)


if __name__ == "__main__":
    main()
