"""What is measured while a model trains: validation, samples, tasks. Nothing here may stop a training run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from nanoworks.config import Recipe
from nanoworks.engine import Engine, EngineConfig, SamplingParams
from nanoworks.evals import evaluate
from nanoworks.models import Decoder
from nanoworks.parallel import Strategy
from nanoworks.tasks import Task
from nanoworks.tokenizer import Tokenizer
from nanoworks.train.run import RunDirectory
from nanoworks.train.stage import Stage

log = logging.getLogger("nanoworks")


class Observer:
    def __init__(
        self,
        *,
        recipe: Recipe,
        model: Decoder,
        tokenizer: Tokenizer,
        stage: Stage,
        run: RunDirectory,
        tasks: dict[str, Task],
        strategy: Strategy,
    ) -> None:
        """`tasks` are those of `eval.tasks`, built and ready."""
        self.recipe, self.model, self.tokenizer = recipe, model, tokenizer
        self.stage, self.run, self.tasks, self.strategy = stage, run, tasks, strategy

    def at_step(self, step: int, *, last: bool) -> dict[str, float]:
        """Measure what the recipe asks for at `step`; returns the metrics of what succeeded."""
        e, t = self.recipe.eval, self.recipe.train
        metrics: dict[str, float] = {}
        self.model.eval()
        if last or _due(step, e.every):
            metrics.update(self._attempt("validation", self.stage.evaluate))
        sample = bool(t.sample_prompts) and (last or _due(step, t.sample_every))
        score = bool(self.tasks) and (last or _due(step, e.tasks_every))
        if sample or score:
            whole = self.strategy.replica(self.model)  # every rank gives its part, the first one measures
            if self.strategy.mesh.is_main:
                metrics.update(self._generate(whole, step, sample=sample, score=score))
            self.strategy.barrier()
        return metrics

    def _generate(self, model: Decoder, step: int, *, sample: bool, score: bool) -> dict[str, float]:
        """What needs the engine: it is fresh each time, as the weights have moved."""
        metrics: dict[str, float] = {}
        if sample:
            self._attempt("sampling", partial(self._sample, model, step))
        for name, task in self.tasks.items() if score else ():
            metrics.update(self._attempt(f"task {name}", partial(self._score, model, step, name, task)))
        return metrics

    def _sample(self, model: Decoder, step: int) -> dict[str, float]:
        t = self.recipe.train
        prompts = [self.tokenizer.encode(p, bos=True) for p in t.sample_prompts]
        params = SamplingParams(max_tokens=t.sample_tokens, temperature=0.0)
        for prompt, group in zip(t.sample_prompts, self._engine(model).generate(prompts, params), strict=True):
            self.run.add_sample({"step": step, "prompt": prompt, "completion": group[0].text})
        return {}

    def _score(self, model: Decoder, step: int, name: str, task: Task) -> dict[str, float]:
        result = evaluate(
            self._engine(model),
            self.tokenizer,
            task,
            name=name,
            max_examples=self.recipe.eval.max_examples,
            max_tokens=self.recipe.eval.max_tokens,
            out=self.run.path / "evals" / f"step-{step:06d}",
            step=step,
        )
        return {f"eval/{name}": result.value}

    def _engine(self, model: Decoder) -> Engine:
        return Engine(model, self.tokenizer, EngineConfig())

    def _attempt(self, what: str, measure: Callable[[], dict[str, Any]]) -> dict[str, float]:
        try:
            return measure()
        except Exception as error:  # an evaluation is never worth the run
            log.warning("%s failed and is left out: %s: %s", what, type(error).__name__, error)
            return {}


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
