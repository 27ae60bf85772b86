"""Saving a run, and going on from what was saved: complete or not at all, whatever the ranks, in a thread if asked to.

A step is a model directory (`checkpoint.write_model`) and `state/` for resuming. One process writes both. Where ranks
hold parts (`Strategy.in_parts`), each writes its own; the first rank then makes a Hugging Face directory of the
weights, reading one tensor at a time, and gives the step its name. With `checkpoint.async_save` the parts are copied to
host memory, the run goes on, and a thread does the writing; the next save, the end of the run and a signal wait for it.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanoworks import __version__
from nanoworks.checkpoint import load_state, save_checkpoint, save_state
from nanoworks.checkpoint.checkpoint import write_model
from nanoworks.checkpoint.sharded import Shards, host_copies, load_parts, save_parts, saving_group, together
from nanoworks.checkpoint.state import save_values
from nanoworks.common.errors import UserError
from nanoworks.common.files import atomic_directory
from nanoworks.config import Recipe
from nanoworks.models import Decoder, build_model
from nanoworks.parallel import Strategy
from nanoworks.tokenizer import Tokenizer
from nanoworks.train.optim import Optimizer
from nanoworks.train.run import RunDirectory
from nanoworks.train.stage import Stage

log = logging.getLogger("nanoworks")

_OPTIMIZER = "optimizer."
_RNG = "rng."


@dataclass
class Progress:
    """Where a run stands. Everything here is saved and restored."""

    step: int = 0
    """Optimizer steps taken."""
    tokens: int = 0
    """Supervised tokens seen."""
    seconds: float = 0.0
    """Time spent training, over all sittings."""
    best_loss: float = math.inf
    best_step: int | None = None
    data: dict[str, Any] | None = None
    """State of the last micro-batch."""
    data_hash: str = ""
    """Of every token trained on, in order (hexadecimal): two runs with the same one saw the same."""


@dataclass(frozen=True)
class _Step:
    """What a step on disk is made of; tensors as this rank has them."""

    target: Path
    model: Decoder
    """On the meta device: names and shapes."""
    weights: Mapping[str, Tensor]
    state: Mapping[str, Tensor]
    values: Mapping[str, Any]
    metadata: Mapping[str, Any]
    best: int | None


class Saver:
    """Every rank makes one, and calls each method when the others do."""

    def __init__(
        self,
        *,
        recipe: Recipe,
        model: Decoder,
        tokenizer: Tokenizer,
        stage: Stage,
        optimizer: Optimizer,
        strategy: Strategy,
        run: RunDirectory,
        device: torch.device,
    ) -> None:
        """UserError when the recipe wants `checkpoint.async_save` and this run cannot."""
        self.recipe, self.model, self.tokenizer, self.stage = recipe, model, tokenizer, stage
        self.optimizer, self.strategy, self.run, self.device = optimizer, strategy, run, device
        many = strategy.mesh.world_size > 1
        self._group = saving_group() if many and strategy.in_parts else None
        self._thread: ThreadPoolExecutor | None = None
        if recipe.checkpoint.async_save:
            if stage.trained is not model:
                raise UserError(f"the stage {recipe.stage.name} saves at once; set checkpoint.async_save=false")
            if many and self._group is None:
                raise UserError("these ranks' tensors are only to be had whole; set checkpoint.async_save=false")
            self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self.begun: int | None = None
        """The last step whose saving was begun."""
        self.complete: int | None = None
        """The last step that is on disk."""

    def save(self, progress: Progress) -> float:
        """Write the present step, then drop what is no longer kept. Returns for how many seconds training stood still.

        Raises:
            UserError: this step could not be written, or the one before it, which a thread was writing.
        """
        began = time.perf_counter()
        self.wait()
        if (waited := time.perf_counter() - began) > 1:
            log.warning("waited %.0f s for the step before to be written; a larger checkpoint.every avoids it", waited)
        step = self._collect(progress)
        self.begun = progress.step
        write = partial(self._write, step, progress.step)
        if self._thread is None:
            write()
        else:
            self._writing = self._thread.submit(write)
        return time.perf_counter() - began

    @property
    def failed(self) -> bool:
        """Whether the thread could not write its step: `wait` says why."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def wait(self) -> None:
        """Until nothing is being written; UserError when it could not be."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def close(self) -> None:
        """Wait, and let the thread go."""
        if self._thread is not None:
            self._thread.shutdown()

    def restore(self, directory: Path) -> dict[str, Any]:
        """Take back optimizer, stage and random numbers from a step, whose weights the model holds already.

        Returns:
            The rest of what was saved: "progress", and "data", the position of each data rank.

        Raises:
            UserError: there is no state, it is of another model or optimizer, or a shard is missing.
        """
        saved, values = load_state(directory / "state")
        with saved:
            if self._group is None:
                self.optimizer.load_state_dict(saved.under(_OPTIMIZER))
            else:
                own = self._optimizer_state()
                _require_same(own, saved)
                load_parts(directory / "state", own, self._group)
            self.stage.resume(directory)
            torch.set_rng_state(saved[f"{_RNG}cpu"])  # last: what came before may have drawn
            if self.device.type == "cuda" and f"{_RNG}cuda" in saved:
                torch.cuda.set_rng_state(saved[f"{_RNG}cuda"], self.device)
        self.begun = self.complete = int(values["progress"]["step"])
        return values

    def _optimizer_state(self) -> dict[str, Tensor]:
        return {f"{_OPTIMIZER}{name}": tensor for name, tensor in self.optimizer.state_dict().items()}

    def _collect(self, progress: Progress) -> _Step:
        mesh, model, info = self.strategy.mesh, self.model, self.run.info
        weights: dict[str, Tensor] = {name: p.detach() for name, p in model.named_parameters()}
        state = self._optimizer_state()
        if mesh.is_main or self._group is None:  # one rank's, which all go on from
            state[f"{_RNG}cpu"] = torch.get_rng_state()
            if self.device.type == "cuda":
                state[f"{_RNG}cuda"] = torch.cuda.get_rng_state(self.device)
        if self._thread is not None:
            weights, state = host_copies(weights), host_copies(state)
        values: dict[str, Any] = {"progress": dict(vars(progress))}
        if mesh.data_world_size > 1:
            positions = dict(self.strategy.gather([mesh.data_rank, progress.data]))
            values["data"] = [positions[rank] for rank in range(mesh.data_world_size)]
        with torch.device("meta"):  # of float32 like what a run trains, whatever an engine computes with
            model = build_model(model.config)
        metadata = {
            "run_id": info.get("id"),
            "stage": info.get("stage"),
            "step": progress.step,
            "parent": info.get("parent"),
            "data_hash": progress.data_hash,
            "version": __version__,
        }
        best = progress.best_step if self.recipe.checkpoint.keep_best else None
        return _Step(self.run.step_path(progress.step), model, weights, state, values, metadata, best)

    def _write(self, step: _Step, number: int) -> None:
        if self._group is None:
            self._write_whole(step)
        else:
            self._write_parts(step)
        self.complete = number

    def _write_whole(self, step: _Step) -> None:
        """The first rank writes all tensors, which the others give it one after the other."""
        weights = self.strategy.wholes(step.weights)
        empty = {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in step.state.items()}
        shapes = dict(self.strategy.wholes(empty))
        state = self.strategy.wholes(step.state)
        if self.strategy.mesh.is_main:
            with save_checkpoint(
                step.target, step.model, self.tokenizer, metadata=step.metadata, read=lambda _: next(weights)[1]
            ) as scratch:
                save_state(scratch / "state", shapes, step.values, read=lambda _: next(state)[1])
                self.stage.save(scratch)
            self._prune(step)
        else:
            for _ in itertools.chain(weights, state):
                pass
        self.strategy.barrier()

    def _write_parts(self, step: _Step) -> None:
        """Every rank writes what it holds; the first makes a model directory of the weights."""
        group, is_main = self._group, self.strategy.mesh.is_main
        assert group is not None
        with contextlib.ExitStack() as stack:
            begin = partial(stack.enter_context, atomic_directory(step.target))
            scratch = together(group, begin if is_main else Path)[0]
            save_parts(scratch / "weights", step.weights, group)
            save_parts(scratch / "state", step.state, group)
            together(group, partial(self._finish, step, scratch, stack) if is_main else _nothing)

    def _finish(self, step: _Step, scratch: Path, stack: contextlib.ExitStack) -> None:
        with Shards(scratch / "weights") as shards:
            write_model(scratch, step.model, self.tokenizer, metadata=step.metadata, read=shards.__getitem__)
        shutil.rmtree(scratch / "weights")
        save_values(scratch / "state", step.values)
        self.stage.save(scratch)
        stack.close()  # the step gets its name
        self._prune(step)

    def _prune(self, step: _Step) -> None:
        self.run.prune(keep_last=self.recipe.checkpoint.keep_last, best=step.best)


def _nothing() -> None: ...


def _require_same(own: Mapping[str, Tensor], saved: Shards) -> None:
    wrong = sorted(n for n, t in own.items() if n not in saved or saved.specs[n].shape != tuple(t.shape))
    if wrong:
        raise UserError(
            f"the saved optimizer state is not of this model and optimizer: {len(wrong)} tensors differ, the first is "
            f"{wrong[0].removeprefix(_OPTIMIZER)!r}; resume with the recipe the run was started with"
        )
