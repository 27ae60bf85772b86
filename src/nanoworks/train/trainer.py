"""The one training loop. What a stage is, its `Stage` says; everything that must never go wrong is here.

A step: take the stage's micro-batches; loss = sum over supervised tokens / their global count, so it does not
depend on how a step is cut; backward; clip; refuse non-finite numbers before they touch a weight; step; log.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import save_file

from nanoworks.common.device import peak_memory_bytes
from nanoworks.config import Recipe
from nanoworks.models import Decoder
from nanoworks.parallel import Strategy
from nanoworks.tokenizer import Tokenizer
from nanoworks.trackers import Trackers
from nanoworks.train.observe import Observer
from nanoworks.train.optim import Optimizer
from nanoworks.train.run import RunDirectory
from nanoworks.train.saving import Progress, Saver
from nanoworks.train.schedule import Schedule
from nanoworks.train.stage import Loss, Stage
from nanoworks.train.watch import Unwatched

log = logging.getLogger("nanoworks")


class NonFinite(RuntimeError):
    """The loss or the gradient is NaN or infinite. Nothing was stepped and nothing was saved."""


class Trainer:
    def __init__(
        self,
        *,
        recipe: Recipe,
        model: Decoder,
        tokenizer: Tokenizer,
        stage: Stage,
        optimizer: Optimizer,
        schedule: Schedule,
        strategy: Strategy,
        run: RunDirectory,
        trackers: Trackers,
        observer: Observer,
        device: torch.device,
        peak_flops: float,
        total_steps: int,
        watch: Unwatched | None = None,
    ) -> None:
        self.recipe, self.model, self.tokenizer, self.stage = recipe, model, tokenizer, stage
        self.optimizer, self.schedule, self.strategy = optimizer, schedule, strategy
        self.run, self.trackers, self.observer, self.device = run, trackers, observer, device
        self.peak_flops, self.watch = peak_flops, watch or Unwatched()
        self.total_steps = optimizer.total_steps = total_steps
        self.progress = Progress()
        self.saver = Saver(
            recipe=recipe,
            model=model,
            tokenizer=tokenizer,
            stage=stage,
            optimizer=optimizer,
            strategy=strategy,
            run=run,
            device=device,
        )
        self._stop: signal.Signals | None = None

    def resume(self, directory: Path) -> None:
        """Continue from `directory`, whose weights the model already holds."""
        values = self.saver.restore(directory)
        self.progress = Progress(**values["progress"])
        positions, mesh = values.get("data", []), self.strategy.mesh
        if len(positions) == mesh.data_world_size:  # on another number of ranks all go on from the first one's
            self.progress.data = positions[mesh.data_rank]

    def fit(self) -> bool:
        """Train to the last step. Returns False when a signal ended it early (the state is saved)."""
        p = self.progress
        with self._signals():
            batches = self.stage.batches(p.data)
            try:
                while p.step < self.total_steps and not self._stopping():
                    self._step(batches)
                    last = p.step == self.total_steps
                    self._observe(last=last)
                    if last or (self.recipe.checkpoint.every and p.step % self.recipe.checkpoint.every == 0):
                        self.save()
                if p.step < self.total_steps and self.saver.begun != p.step:
                    self.save()
                self.saver.wait()
            finally:
                self.saver.close()
                self.stage.close()
        return p.step >= self.total_steps

    def save(self) -> None:
        """Write the checkpoint of the present step, complete or not at all, then drop what is no longer kept."""
        stall = self.saver.save(self.progress)
        if self.recipe.checkpoint.async_save:
            self.trackers.log({"checkpoint/stall_ms": stall * 1000}, self.progress.step)

    def _step(self, batches: Iterator[list[Any]]) -> None:
        p, started = self.progress, time.perf_counter()
        self.model.train()
        micro_batches = next(batches)
        self.watch.begin(p.step + 1, time.perf_counter() - started)
        [supervised] = self.strategy.sum([sum(b.num_supervised for b in micro_batches)])
        scale = 1.0 / max(supervised, 1.0)  # an all-masked step has loss 0 and gradient 0
        sums: dict[str, float] = {}
        self.optimizer.zero_grad()
        self.stage.before_step(p.step, self.total_steps, self.optimizer)
        losses = self.strategy.forward_backward(micro_batches, self.stage.loss, scale)
        for loss in losses:
            for name, value in {"train/loss": loss.sum, **loss.metrics}.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach())
        self._check_losses(losses, micro_batches)
        norm = self.strategy.clip(self.stage.trained, self.recipe.train.grad_clip)
        if not math.isfinite(norm):
            self._refuse("gradient norm", micro_batches[0])
        lr_scale = self.schedule(p.step, self.total_steps)
        self.strategy.step(self.optimizer, lr_scale, p.step)
        self.stage.after_step()

        p.step += 1
        p.tokens += int(supervised)
        p.data = micro_batches[-1].state
        for batch in micro_batches:
            seen = p.data_hash.encode() + batch.tokens.cpu().numpy().tobytes()
            p.data_hash = hashlib.blake2b(seen, digest_size=16).hexdigest()
        seconds = time.perf_counter() - started
        p.seconds += seconds
        processed, *totals = self.strategy.sum([sum(b.tokens.numel() for b in micro_batches), *sums.values()])
        metrics = {name: total * scale for name, total in zip(sums, totals, strict=True)}
        for batch in micro_batches:
            for name, value in batch.stats.items():
                metrics[f"data/{name}"] = metrics.get(f"data/{name}", 0.0) + value / len(micro_batches)
        metrics.update(self.stage.step_metrics())
        metrics.update(self.watch.end())
        metrics.update(self.strategy.metrics())
        metrics["train/lr"] = self.optimizer.lrs["matrix"] * lr_scale
        metrics["train/grad_norm"] = norm
        metrics["train/tokens"] = p.tokens
        metrics["train/tokens_per_second"] = processed / seconds
        metrics["train/step_seconds"] = seconds
        flops = self.stage.flops_per_token(micro_batches[0].tokens.size(-1)) * processed
        metrics["train/mfu"] = flops / seconds / (self.peak_flops * self.strategy.mesh.world_size)
        metrics["train/memory_gib"] = peak_memory_bytes(self.device) / 2**30
        self.trackers.log(metrics, p.step)

    def _stopping(self) -> bool:
        """Whether a signal reached any rank, or a step could not be saved: all stop at the same step."""
        return any(self.strategy.gather(self._stop is not None or self.saver.failed))

    def _observe(self, *, last: bool) -> None:
        """Validate, sample and score when it is time. What fails here is logged and training goes on."""
        p = self.progress
        metrics = self.observer.at_step(p.step, last=last)
        self.strategy.settle()
        if metrics:
            self.trackers.log(metrics, p.step)
        if metrics.get("val/loss", math.inf) < p.best_loss:
            p.best_loss, p.best_step = metrics["val/loss"], p.step

    def _check_losses(self, losses: list[Loss], micro_batches: list[Any]) -> None:
        """Stop every rank when the loss of one is not finite; the message names it, and those that share its rows."""
        bad = next((i for i, loss in enumerate(losses) if not math.isfinite(float(loss.sum.detach()))), None)
        found = self.strategy.gather(bad)
        if any(index is not None for index in found):
            ranks = [rank for rank, index in enumerate(found) if index is not None]
            self._refuse("loss", micro_batches[bad or 0], index=found[ranks[0]] if bad is None else bad, ranks=ranks)

    def _refuse(self, what: str, batch: Any, *, index: int = 0, ranks: list[int] | None = None) -> None:
        step, mesh = self.progress.step + 1, self.strategy.mesh
        self.saver.close()  # what is being written is complete first
        kept = self.run.step_path(self.saver.complete) if self.saver.complete is not None else None
        where, tokens = "", ""
        if mesh.world_size > 1 and ranks:
            where = f" on rank{'s' if ranks[1:] else ''} {' and '.join(map(str, ranks))}"
        if ranks is None or mesh.rank in ranks:
            suffix = f"-rank-{mesh.rank}" if mesh.world_size > 1 else ""
            file = self.run.path / f"nonfinite-step-{step:06d}{suffix}.safetensors"
            with contextlib.suppress(OSError):
                save_file({"tokens": batch.tokens.cpu().contiguous()}, file)
            tokens = f" (micro-batch {index}, data position {batch.state}); its tokens are in {file}"
        raise NonFinite(
            f"the {what} of step {step} is not finite{where}{tokens}. No weight was changed by it. The last good "
            f"checkpoint is {kept or 'none yet'}; lower the learning rate or clip more (train.grad_clip), then resume"
        )

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Turn SIGTERM and Ctrl-C into a stop at the next step boundary; a second Ctrl-C interrupts at once."""

        def request(number: int, frame: FrameType | None) -> None:
            if self._stop is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._stop = signal.Signals(number)
            log.warning("%s: stopping after this step, then saving", self._stop.name)

        try:
            old = {s: signal.signal(s, request) for s in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not the main thread: whoever runs us there handles signals
            yield
            return
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
