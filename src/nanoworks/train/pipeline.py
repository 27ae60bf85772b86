"""Runs a pipeline: trains its tokenizer, then each stage from the checkpoint of the one before.

Under torchrun the first rank trains the tokenizer and all train the stages.
Whatever is finished is passed over and whatever was interrupted goes on, so running it again is resuming it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanoworks.config import load_recipe
from nanoworks.config.pipeline import Pipeline, TokenizerSection
from nanoworks.data import MixtureReader
from nanoworks.parallel.rendezvous import first_alone
from nanoworks.tokenizer import Tokenizer, train_tokenizer
from nanoworks.train.launch import launch
from nanoworks.train.resolve import build_mixture, resolve

log = logging.getLogger("nanoworks")


@dataclass(frozen=True)
class PipelineStage:
    """One stage and how it ended."""

    run: Path
    finished: bool
    is_main: bool
    """False on every rank but the first."""


def run_pipeline(
    pipeline: Pipeline, recipes: Sequence[Path], root: Path, *, overrides: Sequence[str] = ()
) -> Iterator[PipelineStage]:
    """Yield each stage as it ends; stops after one that a signal interrupted. `overrides` apply to every stage."""
    tokenizer = root / "tokenizer"
    parent: Path | None = None
    stages = []
    for path in recipes:
        links = [f"run.root={root}", f"run.name={path.stem}"]
        if parent is None:
            links += [f"tokenizer={tokenizer}"]
        else:
            links += [f"init_from={parent}", "tokenizer=null", "model=null"]
        stages.append(load_recipe(path, [*links, *overrides]))
        resolve(stages[-1])  # a typo in the last stage is found before the first one trains
        parent = root / path.stem
    first_alone(lambda: prepare_tokenizer(pipeline.tokenizer, tokenizer))
    for recipe in stages:
        outcome = launch(recipe, resume=True)
        yield PipelineStage(outcome.run, outcome.finished, outcome.is_main)
        if not outcome.finished:
            return


def prepare_tokenizer(section: TokenizerSection, directory: Path) -> Tokenizer:
    """Train the tokenizer of a pipeline, or load it when it is there already."""
    if (directory / "tokenizer.json").is_file():
        return Tokenizer.load(directory)
    log.info("tokenizer: learning %d tokens from %.1fM characters", section.vocab_size, section.characters / 1e6)
    tokenizer = train_tokenizer(_texts(section), section.vocab_size, trainer=section.trainer)
    tokenizer.save(directory)
    return tokenizer


def _texts(section: TokenizerSection) -> Iterator[str]:
    left = section.characters
    for drawn in MixtureReader(build_mixture(section.data, "train"), epochs=1):
        document = drawn.document
        for text in [document] if isinstance(document, str) else _parts(document):
            yield text
            left -= len(text)
        if left <= 0:
            return


def _parts(conversation: dict[str, list[dict[str, object]]]) -> Iterator[str]:
    for message in conversation["messages"]:
        content = message["content"]
        if isinstance(content, str):
            yield content
        else:
            assert isinstance(content, list)
            yield from (part["text"] for part in content)
