"""Reinforcement learning on task rewards: sample answers with the engine that serves, push up those that score
better than their siblings.

For each prompt the engine draws a group of answers; an answer's advantage is its reward minus the group's mean
(REINFORCE with a group baseline), optionally over the group's standard deviation (GRPO,
https://arxiv.org/abs/2402.03300). The loss of a sampled token is -advantage * ratio, where ratio is the
probability under the model now over that when it was sampled; `clip` bounds the ratio as PPO does
(https://arxiv.org/abs/1707.06347), `kl` pulls towards the model the run started from. Tokens that the
calculator forced carry no loss. The loss is averaged over all sampled tokens of the step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from nanoworks.checkpoint import load_checkpoint
from nanoworks.common.errors import UserError
from nanoworks.config import Frozen
from nanoworks.config.base import Method
from nanoworks.config.recipe import parse_length
from nanoworks.engine import Completion, Engine, EngineConfig, SamplingParams
from nanoworks.models import Decoder
from nanoworks.nn.context import DenseContext
from nanoworks.nn.linear import set_compute_dtype
from nanoworks.tasks import TASKS, Task
from nanoworks.train.stage import STAGES, Loss, Stage, StageContext


@dataclass(frozen=True)
class RolloutBatch:
    """Rows of prompt + answer, padded on the right. Shapes (B, T); `weights` is 1 on sampled tokens."""

    tokens: Tensor
    targets: Tensor
    weights: Tensor
    advantages: Tensor
    sampled_logprobs: Tensor
    """Log-probability of each target as the engine saw it when it was sampled."""
    num_supervised: int
    state: dict[str, Any]
    stats: dict[str, float] = field(default_factory=dict)

    def to(self, device: torch.device) -> RolloutBatch:
        moved: dict[str, Any] = {name: getattr(self, name).to(device) for name in _TENSORS}
        return replace(self, **moved)


@STAGES.register("rl")
class RL(Stage):
    class Options(Frozen):
        tasks: list[Method] = Field(min_length=1, description="tasks whose score is the reward")
        prompts_per_step: int = Field(default=16, gt=0)
        samples_per_prompt: int = Field(default=16, gt=1, description="size of a group")
        max_new_tokens: int = Field(default=256, gt=0)
        temperature: float = Field(default=1.0, gt=0)
        top_k: int | None = Field(default=None, gt=0, description="nanochat samples with 50")
        normalise: bool = Field(default=False, description="divide advantages by the group's standard deviation")
        clip: float | None = Field(default=None, gt=0, lt=1, description="bound of |ratio - 1|; null: none")
        kl: float = Field(default=0.0, ge=0, description="weight of the divergence from the starting model")
        updates_per_rollout: int = Field(default=1, gt=0, description="optimizer steps on the same answers")

    options: Options

    def __init__(self, context: StageContext, options: Options) -> None:
        super().__init__(context, options)
        self.tasks: list[Task] = []
        for i, method in enumerate(options.tasks):
            task_options = {"split": "train", **method.options}
            parsed = TASKS.parse(method.name, task_options, where=f"stage.tasks.{i}")
            self.tasks.append(TASKS.get(method.name)(parsed))
        self.prompts = [(task, i) for task in self.tasks for i in range(len(task))]
        mesh = context.strategy.mesh
        if options.prompts_per_step % mesh.data_world_size:
            raise UserError(
                f"stage.prompts_per_step={options.prompts_per_step} cannot be shared evenly by {mesh.data_world_size} "
                f"data ranks; use a multiple of {mesh.data_world_size}"
            )
        if mesh.degrees.pipeline > 1:
            raise UserError(
                "an rl stage does not train on the ranks of a pipeline: answers differ in length, and a pipeline needs "
                "micro-batches of one shape; use parallel.pipeline=1, with shard, replicate or tensor"
            )
        self.reference = _starting_model(context) if options.kl > 0 else None
        self._metrics: dict[str, float] = {}

    def total_steps(self) -> int:
        amount, unit = parse_length(self.context.recipe.train.length)
        o = self.options
        if unit == "epochs":
            amount = amount * len(self.prompts) / o.prompts_per_step * o.updates_per_rollout
        elif unit != "steps":
            raise UserError(f"train.length of an rl stage is in steps or epochs, not {unit}")
        return max(1, math.ceil(amount))

    def batches(self, state: dict[str, Any] | None) -> Iterator[list[RolloutBatch]]:
        # A step is identified by its number alone: prompts and seeds follow from it, so a resumed run repeats it.
        step = 0 if state is None else state["step"]
        updates = self.options.updates_per_rollout
        rollout: list[RolloutBatch] = [] if state is None else self._restore(state)
        while True:
            if step % updates == 0:
                rollout = self._rollout(step)
            step += 1
            kept = {"step": step}
            if step % updates:  # the answers are needed again after a restart
                kept["rollout"] = self._keep(rollout)
            yield [replace(batch, state=kept) for batch in rollout]

    def loss(self, model: Decoder, batch: RolloutBatch) -> Loss:
        o = self.options
        logprobs = model.head.logprobs(model(batch.tokens, DenseContext(batch.tokens)), batch.targets)
        log_ratio = (logprobs - batch.sampled_logprobs) * batch.weights
        gap = log_ratio.detach().abs().sum()
        ratio = log_ratio.exp()
        gain = ratio * batch.advantages
        if o.clip is not None:
            gain = torch.minimum(gain, ratio.clamp(1 - o.clip, 1 + o.clip) * batch.advantages)
        per_token = -gain
        metrics = {"rl/logprob_gap": gap}
        if self.reference is not None:
            with torch.no_grad():
                hidden = self.reference(batch.tokens, DenseContext(batch.tokens))
                base = self.reference.head.logprobs(hidden, batch.targets)
            # the low-variance, non-negative estimator of http://joschu.net/blog/kl-approx.html
            difference = base - logprobs
            kl = difference.exp() - difference - 1
            per_token = per_token + o.kl * kl
            metrics["rl/kl"] = (kl.detach() * batch.weights).sum()
        return Loss((per_token * batch.weights).sum(), metrics)

    def step_metrics(self) -> dict[str, float]:
        return self._metrics

    def _rollout(self, step: int) -> list[RolloutBatch]:
        """Sample this step's answers with the weights as they are and score them."""
        o, context = self.options, self.context
        mesh = context.strategy.mesh
        # Of one list that all ranks draw, each data rank answers its own, with the seed of the prompt's place in it.
        mine = range(mesh.data_rank, o.prompts_per_step, mesh.data_world_size)
        places = self._choose(step)
        chosen = [self.prompts[places[i]] for i in mine]
        prompts = [context.tokenizer.render_for_completion(task.conversation(i)) for task, i in chosen]
        seed = context.recipe.run.seed * 1_000_003 + step
        params = [
            SamplingParams(
                max_tokens=o.max_new_tokens,
                temperature=o.temperature,
                top_k=o.top_k,
                n=o.samples_per_prompt,
                seed=seed * 4096 + i,
            )
            for i in mine
        ]
        context.model.eval()
        whole = context.strategy.replica(context.model)
        groups = Engine(whole, context.tokenizer, EngineConfig()).generate(prompts, params)
        context.model.train()
        rewards = np.array(
            [[task.score(i, c.text) for c in group] for (task, i), group in zip(chosen, groups, strict=True)]
        )
        advantages = rewards - rewards.mean(axis=1, keepdims=True)
        if o.normalise:
            advantages /= rewards.std(axis=1, keepdims=True) + 1e-6
        lengths = [len(c.token_ids) for group in groups for c in group]
        figures = {
            "rl/reward": float(rewards.mean()),
            "rl/solved_all": float((rewards.min(axis=1) >= 1).mean()),
            "rl/solved_any": float((rewards.max(axis=1) >= 1).mean()),
            "rl/length": float(np.mean(lengths)),
        }
        totals = context.strategy.sum(list(figures.values()))
        self._metrics = {name: total / mesh.data_world_size for name, total in zip(figures, totals, strict=True)}
        rows = [
            (prompt, completion, float(advantage))
            for prompt, group, group_advantages in zip(prompts, groups, advantages, strict=True)
            for completion, advantage in zip(group, group_advantages, strict=True)
        ]
        size = context.recipe.train.micro_batch_size
        return [self._batch(rows[i : i + size]) for i in range(0, len(rows), size)]

    def _choose(self, step: int) -> list[int]:
        """Indices of the prompts of a step: a new permutation of all of them every epoch."""
        count, size = len(self.prompts), self.options.prompts_per_step
        start = step // self.options.updates_per_rollout * size
        chosen = []
        for position in range(start, start + size):
            epoch, offset = divmod(position, count)
            order = np.random.default_rng([self.context.recipe.run.seed, epoch]).permutation(count)
            chosen.append(int(order[offset]))
        return chosen

    def _batch(self, rows: Sequence[tuple[list[int], Completion, float]]) -> RolloutBatch:
        length = max(len(prompt) + len(c.token_ids) for prompt, c, _ in rows) - 1
        d = self.context.strategy.mesh.degrees
        length += -length % (2 * d.context * d.tensor if d.context * d.tensor > 1 else 1)  # ranks share the tokens
        tokens = torch.zeros(len(rows), length, dtype=torch.long)
        targets = torch.zeros(len(rows), length, dtype=torch.long)
        weights, advantages, logprobs = torch.zeros(3, len(rows), length)
        for r, (prompt, completion, advantage) in enumerate(rows):
            ids = torch.tensor([*prompt, *completion.token_ids])
            answer = slice(len(prompt) - 1, len(ids) - 1)
            tokens[r, : len(ids) - 1] = ids[:-1]
            targets[r, : len(ids) - 1] = ids[1:]
            weights[r, answer] = torch.tensor(completion.mask, dtype=torch.float32)
            advantages[r, answer] = advantage
            logprobs[r, answer] = torch.tensor(completion.logprobs, dtype=torch.float32)
        return RolloutBatch(tokens, targets, weights, advantages, logprobs, int(weights.sum()), state={})

    def _keep(self, rollout: list[RolloutBatch]) -> list[dict[str, Any]]:
        return [{name: getattr(b, name).tolist() for name in _TENSORS} for b in rollout]

    def _restore(self, state: dict[str, Any]) -> list[RolloutBatch]:
        restored = []
        for saved in state.get("rollout", []):
            tensors: dict[str, Any] = {
                name: torch.tensor(saved[name], dtype=torch.long if name in _INTEGERS else torch.float32)
                for name in _TENSORS
            }
            supervised = int(tensors["weights"].sum())
            restored.append(RolloutBatch(**tensors, num_supervised=supervised, state=state))
        return restored


def _starting_model(context: StageContext) -> Decoder:
    """The frozen model that the run began with; read from disk, since a resumed run's own model has moved on."""
    recipe = context.recipe
    if recipe.init_from is None:
        raise UserError("stage.kl holds the model to the one it started from, so it needs init_from")
    model = load_checkpoint(recipe.init_from, device=context.device, dtype=torch.float32).model
    set_compute_dtype(model, context.model.head.lm_head.compute_dtype)
    return model.eval().requires_grad_(False)


_INTEGERS = ("tokens", "targets")
_TENSORS = (*_INTEGERS, "weights", "advantages", "sampled_logprobs")
