"""What structured output costs a step: `python benchmarks/structured.py [--batch 16]`.

A random Llama of 120M parameters (12 x 768, vocabulary of 32,000) writes `--batch` texts at once: plain ones, and such
under grammars. Printed are the time of a step and the part of it that grammars took: following the output, computing
masks, applying them to the logits, and, with few tokens left, seeing to it that documents end in time.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from nanoworks.engine import Engine, EngineConfig, SamplingParams, adjust
from nanoworks.engine.grammar import Grammar
from nanoworks.engine.guidance import GrammarState
from nanoworks.engine.request import Request
from nanoworks.models import build_model, config_from_dict
from nanoworks.tokenizer import SPLIT_PATTERN, Tokenizer

VOCAB = 32_000
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "address": {"type": "object", "properties": {"street": {"type": "string"}, "zip": {"type": "integer"}}},
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
}


def random_tokenizer() -> Tokenizer:
    """All bytes, and pieces of random words as long as those of a real vocabulary; no text is encoded here."""
    random.seed(0)
    tokens = {bytes([i]): i for i in range(256)}
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    while len(tokens) < VOCAB - 9:
        word = "".join(random.choices(letters, range(26, 0, -1), k=random.randint(2, 9)))
        tokens.setdefault(
            (random.choice(["", " "]) + word + random.choice(["", "", "", '"', ","])).encode(), len(tokens)
        )
    return Tokenizer.from_ranks(tokens, SPLIT_PATTERN)


def build() -> Engine:
    torch.manual_seed(0)
    config = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
    }
    model = build_model(config_from_dict(config))
    model.init_weights()
    return Engine(model.eval().to(torch.bfloat16), random_tokenizer(), EngineConfig(tools=False))


class Clock:
    """Adds up the time spent in some functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def watch(self, owner: Any, name: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **named: Any) -> Any:
            start = time.thread_time()
            try:
                return function(*args, **named)
            finally:
                self.seconds += time.thread_time() - start

        setattr(owner, name, timed)


def steps(engine: Engine, params: SamplingParams, batch: int, clock: Clock) -> tuple[list[float], list[float]]:
    """Return the seconds of up to 60 steps that generate for the whole batch, and those of their masks."""
    requests = [Request([1 + i, 2, 3, 4], params) for i in range(batch)]
    for request in requests:
        engine.add(request)
    totals: list[float] = []
    masks: list[float] = []
    while engine.has_work and len(totals) < 60:
        clock.seconds, start = 0.0, time.thread_time()
        deltas = engine.step()
        if len(deltas) == batch and not any(delta.finish_reason for delta in deltas):
            totals.append(time.thread_time() - start)
            masks.append(clock.seconds)
    for request in requests:
        engine.cancel(request.request_id)
    engine.step()
    return totals, masks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    engine, clock = build(), Clock()
    for owner, name in ((adjust, "_guide"), (GrammarState, "follow"), (GrammarState, "fit")):
        clock.watch(owner, name)
    schema = Grammar.json_schema(SCHEMA)
    cases = {
        "plain text": (None, 900),
        "regex": (Grammar("regex", "([a-z]+ )*[a-z]+\\."), 900),
        "json_schema": (schema, 900),
        "json_schema, the end in sight": (schema, 80),
    }
    torch.set_num_threads(1)  # so that the time of this thread, which no other process disturbs, is all of it
    print(f"batch {args.batch}, one thread; median ms of its time a step")
    for name, (grammar, max_tokens) in cases.items():
        params = SamplingParams(max_tokens=max_tokens, seed=0, grammar=grammar, ignore_eos=True)
        steps(engine, params, args.batch, clock)  # compiles, and warms up
        totals, masks = steps(engine, params, args.batch, clock)
        step, mask = statistics.median(totals) * 1e3, statistics.median(masks) * 1e3
        share = f"masks {mask:6.2f}, {mask / (step - mask):5.1%} of the rest" if grammar else ""
        print(f"{name:30s} step {step:8.2f}   {share}   ({len(totals)} steps)")


if __name__ == "__main__":
    main()
