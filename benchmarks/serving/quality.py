"""What each precision costs in quality, beside bf16: so that no row of speed is won by computing less.

    python benchmarks/serving/quality.py runs/demo/rl [--tokens 16384] [--text FILE] [--tasks microworld_facts,...]

For a model that this project trained: perplexity on held-out text (the standard library's validation files, or FILE),
the mean KL divergence KL(bf16 || precision) of the next token, in nats, how often the likeliest token is bf16's, and,
with --tasks, task scores. All through the engine that serves. Each figure twice: with the text `read` as a prompt,
and fed a `token` a step, because an engine takes other kernels for one row than for many.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from torch import Tensor

from nanoworks.checkpoint import load_checkpoint
from nanoworks.data import Loader, build_source
from nanoworks.engine import Engine, EngineConfig
from nanoworks.evals import evaluate
from nanoworks.tasks import build_task
from nanoworks.tokenizer import Tokenizer

PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
    "bf16, KV int8": {"kv_dtype": "int8"},
    "int8, KV int8": {"quantize": "int8", "kv_dtype": "int8"},
}

DEMO_TASKS = ",".join(f"microworld_{n}" for n in ("arithmetic", "facts", "choice", "spelling", "counting", "identity"))


def held_out(tokenizer: Tokenizer, length: int, tokens: int, text: str | None) -> list[list[int]]:
    """Rows of `length` ids from held-out text, `tokens` in all or a little more."""
    source = build_source("text", {"split": "all", "path": text}) if text else build_source("stdlib", {"split": "val"})
    rows: list[list[int]] = []
    with Loader(
        source,
        tokenizer,
        sequence_length=length,
        batch_size=1,
        packing="stream",
        documents=False,
        loss_on="all",
        infinite=False,
    ) as loader:
        for batch in loader:
            rows += batch.tokens.tolist()
            if len(rows) * length >= tokens:
                break
    return rows


def logprobs(engine: Engine, row: list[int]) -> Tensor:
    """(T - 1, V) float32 log-probabilities after each token of `row` but the last, as the engine computes them."""
    seen: list[Tensor] = []
    plain = engine._runner.logits  # the engine keeps only the scores of given tokens; the divergence needs all

    def recording(hidden: Tensor, rows: list[int]) -> Tensor:
        logits = plain(hidden, rows)
        seen.append(logits.float().log_softmax(-1))
        return logits

    engine._runner.logits = recording  # type: ignore[method-assign]
    try:
        engine.loglikelihood([(row[:1], row[1:])])
    finally:
        engine._runner.logits = plain  # type: ignore[method-assign]
    return torch.cat(seen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run, step or model directory")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--text", help="file of text instead of the standard library's validation files")
    parser.add_argument("--tasks", nargs="?", const=DEMO_TASKS, help="default: those of the demo")
    parser.add_argument("--limit", type=int, default=200, help="examples of a task")
    parser.add_argument("--precisions", help="with semicolons between: " + "; ".join(PRECISIONS))
    options = parser.parse_args()
    torch.set_num_threads(2)
    checkpoint = load_checkpoint(options.run, dtype=torch.bfloat16)
    tokenizer = checkpoint.tokenizer
    assert tokenizer is not None, "the model has no tokenizer"
    length = min(options.length, checkpoint.config.max_position_embeddings)
    rows = held_out(tokenizer, length, options.tokens, options.text)
    names = [n.strip() for n in options.precisions.split(";")] if options.precisions else list(PRECISIONS)
    if "bf16" not in names:
        names.insert(0, "bf16")
    tasks = options.tasks.split(",") if options.tasks else []
    print(f"{checkpoint.path}: {sum(map(len, rows)):,} held-out tokens in rows of {length}\n")
    heads = ["precision", "way", "perplexity", "KL to bf16", "same likeliest", *tasks]
    print("| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads))
    reference: dict[str, list[Tensor]] = {}
    for name in names:
        scores = []
        for way, chunk in (("read", 2048), ("token", 1)):
            config = EngineConfig(max_batch_tokens=chunk, prefix_caching=False, kv_memory=0.25, **PRECISIONS[name])
            engine = Engine(checkpoint.model, tokenizer, config)
            nats = divergence = same = count = 0.0
            for i, row in enumerate(rows):
                found = logprobs(engine, row)
                assert len(found) == len(row) - 1
                if name == "bf16":
                    reference.setdefault(way, []).append(found.to(torch.bfloat16) if found.numel() > 2**22 else found)
                base = reference[way][i].float()
                targets = torch.tensor(row[1:])
                nats -= found.gather(1, targets[:, None]).sum().item()
                divergence += (base.exp() * (base - found)).sum().item()
                same += (base.argmax(-1) == found.argmax(-1)).sum().item()
                count += len(found)
            if way == "read" and tasks:
                full = Engine(checkpoint.model, tokenizer, EngineConfig(**PRECISIONS[name]))
                results = [evaluate(full, tokenizer, build_task(t, {}), max_examples=options.limit) for t in tasks]
                scores = [f"{100 * result.value:.1f}%" for result in results]
            shown = [f"{math.exp(nats / count):.4f}", f"{divergence / count:.2e}", f"{100 * same / count:.1f}%"]
            print("| " + " | ".join([name, way, *shown, *(scores if way == "read" else [""] * len(tasks))]) + " |")


if __name__ == "__main__":
    main()
