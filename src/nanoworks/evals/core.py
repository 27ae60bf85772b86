"""The CORE metric of a base model (DataComp-LM, https://arxiv.org/abs/2406.11794), as nanochat measures it.

Three kinds of task, all of them few-shot and all scored by log-likelihood. *Multiple choice*: one context,
several continuations. *Schema*: several contexts, one continuation. Of both the one with the highest mean
log-likelihood per token is the model's answer. *Language modeling*: every token of the continuation has to be
the most likely one. CORE is the mean over the tasks of accuracy centered so that guessing gives 0.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nanoworks.engine import Engine, Loglikelihood
from nanoworks.evals.core_bundle import OFFICIAL_BUNDLE, CoreTask, Item, load_bundle
from nanoworks.evals.progress import progress_bar
from nanoworks.evals.result import TaskResult, mean_and_stderr
from nanoworks.tokenizer import Tokenizer

Pair = tuple[list[int], list[int]]
"""Context ids and continuation ids."""

_ITEMS_AT_ONCE = 64
_FEWSHOT_SEED = 1234  # nanochat's; with the index of the item it decides the examples


def evaluate_core(
    engine: Engine,
    tokenizer: Tokenizer,
    bundle: str = OFFICIAL_BUNDLE,
    *,
    max_examples: int | None = None,
    out: Path | None = None,
    step: int | None = None,
    progress: bool = False,
) -> TaskResult:
    """Return CORE, with the accuracy of each task in `details`.

    A task that fails is recorded with its message and the others go on; CORE itself is then NaN, because it
    is defined over all of them.

    Args:
        bundle: directory, .zip or address of the .zip; see core_bundle.py.
        max_examples: items of each task; None: all. Few-shot examples come from all items either way.
    """
    details: dict[str, Any] = {}
    examples: list[dict[str, Any]] = []
    centered, errors = [], []
    variance = 0.0
    tasks = load_bundle(bundle)
    for task in tasks:
        try:
            with progress_bar(task.label, show=progress) as update:
                rows = []
                items = task.items()
                count = min(len(items), max_examples or len(items))
                for row in _answers(engine, tokenizer, task, items, count):
                    rows.append(row)
                    update(len(rows), count)
        except Exception as error:
            details[task.label] = {"error": f"{type(error).__name__}: {error}"}
            errors.append(f"{task.label}: {error}")
            continue
        accuracy, stderr = mean_and_stderr([row["score"] for row in rows])
        value = (accuracy - task.baseline) / (1 - task.baseline)
        details[task.label] = {"accuracy": accuracy, "centered": value, "stderr": stderr, "n": len(rows)}
        centered.append(value)
        variance += (stderr / (1 - task.baseline)) ** 2
        examples += [{"task": task.label, **row} for row in rows]
    result = TaskResult(
        task="core",
        kind="core",
        metric="centered accuracy",
        value=math.nan if errors else math.fsum(centered) / len(tasks),
        stderr=math.nan if errors else math.sqrt(variance) / len(tasks),
        n=len(examples),
        settings={"max_examples": max_examples, "bundle": bundle},
        details=details,
        error="; ".join(errors) or None,
        examples=examples,
    )
    if out is not None:
        result.write(out, step=step)
    return result


def _answers(
    engine: Engine, tokenizer: Tokenizer, task: CoreTask, items: Sequence[Item], count: int
) -> Iterator[dict[str, Any]]:
    """Yield {"index", "score", ...} for the first `count` items."""
    for start in range(0, count, _ITEMS_AT_ONCE):
        indices = range(start, min(start + _ITEMS_AT_ONCE, count))
        groups = [item_pairs(tokenizer, task, items, i, longest=engine.max_context) for i in indices]
        found = iter(engine.loglikelihood([pair for group in groups for pair in group]))
        for i, group in zip(indices, groups, strict=True):
            yield {"index": i, **_score(task, items[i], [next(found) for _ in group])}


def _score(task: CoreTask, item: Item, likelihoods: list[Loglikelihood]) -> dict[str, Any]:
    if not all(math.isfinite(likelihood.sum) for likelihood in likelihoods):
        raise ValueError("the model's output is not finite")
    if task.kind == "language_modeling":
        return {"score": float(likelihoods[0].greedy), "loglikelihood": likelihoods[0].sum}
    means = [likelihood.sum / len(likelihood.tokens) for likelihood in likelihoods]
    prediction = max(range(len(means)), key=means.__getitem__)
    score = float(prediction == item["gold"])
    return {"score": score, "gold": item["gold"], "prediction": prediction, "mean_loglikelihoods": means}


def item_pairs(tokenizer: Tokenizer, task: CoreTask, items: Sequence[Item], i: int, *, longest: int) -> list[Pair]:
    """Return what to score for item i: a pair for each choice, or one for language modeling.

    The texts are tokenized whole and split where their tokens agree: choices after their common beginning,
    contexts before their common end. A context too long for the model loses its beginning.
    """
    shots = [items[j] for j in _fewshot(len(items), i, task.num_fewshot)]
    texts = item_texts(task, items[i], shots)
    tokens = [tokenizer.encode(text, bos=True) for text in texts]
    if task.kind == "schema":
        suffix = _common_prefix([ids[::-1] for ids in tokens])
        starts = [len(ids) - suffix for ids in tokens]
    else:
        starts = [_common_prefix(tokens)] * len(tokens)
    if task.kind == "language_modeling":
        tokens, starts = tokens[1:], starts[1:]
    # at least bos before and one token after the cut
    starts = [min(max(start, 1), len(ids) - 1) for start, ids in zip(starts, tokens, strict=True)]
    return [(ids[max(0, len(ids) - longest) : start], ids[start:]) for ids, start in zip(tokens, starts, strict=True)]


def item_texts(task: CoreTask, item: Item, shots: Sequence[Item]) -> list[str]:
    """Return the text of every choice; for language modeling the texts without and with the continuation."""
    join = task.delimiter.join
    if task.kind == "multiple_choice":
        before = "".join(join((shot["query"], shot["choices"][shot["gold"]])) + "\n\n" for shot in shots)
        return [before + join((item["query"], choice)) for choice in item["choices"]]
    if task.kind == "schema":
        before = "".join(join((shot["context_options"][shot["gold"]], shot["continuation"])) + "\n\n" for shot in shots)
        return [before + join((context, item["continuation"])) for context in item["context_options"]]
    # Contexts carry stray space at their ends, which would become part of the continuation's first token.
    before = "".join(join((shot["context"].strip(), shot["continuation"])) + "\n\n" for shot in shots)
    without = before + join((item["context"].strip(), ""))
    return [without.strip(), without + item["continuation"]]


def _fewshot(count: int, i: int, shots: int) -> list[int]:
    """Return the indices of the few-shot examples of item i: any but i."""
    drawn = random.Random(_FEWSHOT_SEED + i).sample(range(count - 1), min(shots, count - 1))
    return [j + (j >= i) for j in drawn]


def _common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Return how many first tokens all sequences share."""
    length = 0
    for column in zip(*sequences, strict=False):
        if len(set(column)) > 1:
            break
        length += 1
    return length
