"""Mixtures of experts in training: the `moe` section of a recipe put into effect.

`ExpertTraining` sets the rules of the model's routers before each step, adds their losses to each micro-batch, moves
their biases after the step, and tells how evenly the experts are used. Everything it does follows from the step, the
model's tensors and torch's generator, so a resumed run needs no more than its checkpoint.

Shapes: N tokens of a micro-batch, E experts.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nanoworks.common.errors import UserError
from nanoworks.config.recipe import MoeSection
from nanoworks.models import Decoder, build_model
from nanoworks.nn.moe import MoE, Routing, TrainingRules, load_balancing_loss, router_z_loss
from nanoworks.parallel.placement import USE_FILE
from nanoworks.parallel.shards import local, part_of
from nanoworks.train.schedule import rise

ROUTER, EXPERTS = "other.router", "matrix.experts"
USE_ROWS = 100
"""About so many steps of a run leave the use of each expert in `USE_FILE`."""


@dataclass
class Use:
    """What one layer's router did in a step."""

    counts: Tensor
    """(E,) how often each expert was chosen."""
    sums: Tensor
    """(4,) over micro-batches: choices beyond a capacity, those dropped, mean log-sum-exp, micro-batches."""
    choices: int = 0

    @classmethod
    def none(cls, num_experts: int, device: torch.device) -> Use:
        return cls(torch.zeros(num_experts, device=device), torch.zeros(4, device=device))

    def add(self, r: Routing, keep: Tensor | None) -> None:
        """Count a micro-batch, on the device; `keep` as for the losses."""
        self.counts += r.counts_of(keep)
        self.sums += torch.stack([r.overflow, r.dropped, r.logits.logsumexp(-1).mean(), r.logits.new_ones(())])
        self.choices += r.experts.numel()

    def numbers(self) -> list[float]:
        """All that was counted."""
        return [*self.counts.tolist(), *self.sums.tolist(), self.choices]

    def replace(self, numbers: Sequence[float]) -> None:
        """Take `numbers`, made of those of several ranks, in place of what was counted here."""
        self.counts.copy_(torch.tensor(numbers[: len(self.counts)]))
        self.sums.copy_(torch.tensor(numbers[len(self.counts) : -1]))
        self.choices = round(numbers[-1])

    def metrics(self) -> dict[str, float]:
        """`entropy` of the use of experts (1: all alike, 0: one does everything), `imbalance` (the busiest over the
        even share), `drop_rate` and `over_capacity` (shares of the choices), `router_z` (mean log-sum-exp)."""
        shares = self.shares()
        overflow, dropped, z, micro_batches = self.sums.tolist()
        return {
            "entropy": utilisation_entropy(shares),
            "imbalance": max(shares) * len(shares),
            "drop_rate": dropped / max(1, self.choices),
            "over_capacity": overflow / max(1, self.choices),
            "router_z": z / max(1, micro_batches),
        }

    def shares(self) -> list[float]:
        """Each expert's part of the choices."""
        counts: list[float] = self.counts.tolist()
        total = max(1.0, sum(counts))
        return [count / total for count in counts]


class ExpertTraining:
    def __init__(self, model: Decoder, section: MoeSection, run: Path | None) -> None:
        """Put `section` into effect on `model`, which may get biases by it; `run` is where `USE_FILE` goes
        (None: another rank writes it).

        Raises:
            UserError: a number that does not fit the model's.
        """
        self.model, self.section = model, section
        self._file = None if run is None else run / USE_FILE
        self.layers = {m.layer: m for m in model.modules() if isinstance(m, MoE)}
        whole = _mixtures(model)
        self.numbers = sorted(whole)  # of all layers with experts; other ranks of a pipeline may hold some of them
        self.num_experts, self.top_k = whole[self.numbers[0]].num_experts, whole[self.numbers[0]].top_k
        _check(section, self.num_experts, self.top_k)
        if section.bias_update_rate and not model.config.router_selection_bias:  # type: ignore[attr-defined]
            model.config = model.config.changed({"router_selection_bias": True})
            for layer in self.layers.values():
                layer.add_selection_bias()
        coef = section.balance_coef
        if coef is None:
            coef = 0.0 if section.bias_update_rate else model.config.router_aux_loss_coef  # type: ignore[attr-defined]
        self._balance = _ends(coef, section.balance_coef_final)
        self._fractions = {
            ROUTER: _ends(section.router_lr_fraction, section.router_lr_fraction_final),
            EXPERTS: _ends(section.expert_lr_fraction, section.expert_lr_fraction_final),
        }
        self._base_lrs: dict[str, float] = {}
        self.begin(0, 1, {})

    def begin(self, step: int, total_steps: int, lrs: dict[str, float]) -> None:
        """Set what holds in step number `step` (from 0); `lrs` are the optimizer's rates by role."""
        s = self.section
        self._step, self._total = step, total_steps
        last = max(1, total_steps - 1)
        self.balance_coef = rise(*self._balance, last, step)
        for role in self._fractions.keys() & lrs.keys():
            base = self._base_lrs.setdefault(role, lrs[role])
            lrs[role] = base * rise(*self._fractions[role], last, step)
        rules = TrainingRules(
            capacity_factor=s.capacity_factor,
            overflow=s.overflow,
            expert_dropout=s.expert_dropout,
            top_k=_gradual(s.active_experts_start, self.top_k, s.active_experts_steps, step),
            open_experts=_gradual(s.open_experts_start, self.num_experts, s.open_experts_steps, step),
        )
        device = next(self.model.parameters()).device
        self._use = {layer: Use.none(self.num_experts, device) for layer in self.numbers}
        for moe in self.layers.values():
            moe.rules = rules

    def loss(self, routing: Mapping[int, Routing], weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What a micro-batch adds to the mean loss, and its parts for the log.

        `weights` (B, T) are those of the targets: what comes after the last one of a row is padding and is left out.
        """
        reached = (weights > 0).flip(-1).int().cummax(dim=-1).values.flip(-1).flatten() > 0
        keep = None if bool(reached.all()) else reached
        routings = list(routing.values())
        groups = [[r] for r in routings] if self.section.balance_over == "layer" else [routings]
        balance = torch.stack([load_balancing_loss(group, keep) for group in groups]).mean()
        z = router_z_loss(routings, keep)
        with torch.no_grad():
            for layer, r in routing.items():
                self._use[layer].add(r, keep)
        total = self.balance_coef * balance + self.section.z_loss_coef * z
        return total, {"moe/balance_loss": balance, "moe/z_loss": z}

    @torch.no_grad()
    def finish(self, total: Callable[[Sequence[float]], list[float]] | None = None) -> None:
        """Move the biases by what the step's tokens chose: up where an expert had less than the even share.

        `total` sums numbers over the ranks that see other tokens (None: there are none).
        """
        if total is not None:
            uses = list(self._use.values())
            summed = iter(total([number for use in uses for number in use.numbers()]))
            for use in uses:
                use.replace(list(itertools.islice(summed, len(use.numbers()))))
        if self.section.bias_update_rate:
            for layer, moe in self.layers.items():
                counts = self._use[layer].counts
                bias = moe.e_score_correction_bias
                assert bias is not None
                local(bias).add_(part_of(bias, (counts.mean() - counts).sign()), alpha=self.section.bias_update_rate)

    def metrics(self) -> dict[str, float]:
        """Of the step: the mean over layers as `moe/<name>`, and each layer's as `moe/layer_<number>/<name>`."""
        by_layer = {layer: use.metrics() for layer, use in self._use.items()}
        names = next(iter(by_layer.values()))
        metrics = {f"moe/{name}": sum(m[name] for m in by_layer.values()) / len(by_layer) for name in names}
        for layer, found in by_layer.items():
            metrics.update({f"moe/layer_{layer:02d}/{name}": found[name] for name in names})
        if (self._step + 1) % max(1, self._total // USE_ROWS) == 0 or self._step + 1 == self._total:
            self._write()
        return metrics

    def _write(self) -> None:
        if self._file is None:
            return
        shares = [[round(share, 5) for share in use.shares()] for use in self._use.values()]
        row = {"step": self._step + 1, "layers": list(self._use), "shares": shares}
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, separators=(",", ":")) + "\n")


def expert_training(model: Decoder, section: MoeSection, run: Path | None) -> ExpertTraining | None:
    """`ExpertTraining` for a model that has experts, None for one that has none.

    Raises:
        UserError: the recipe's `moe` section asks for something and the model has no experts, or other numbers.
    """
    if _mixtures(model):
        return ExpertTraining(model, section, run)
    if asked := section.model_dump(exclude_defaults=True):
        keys = ", ".join(f"moe.{key}" for key in asked)
        raise UserError(
            f"{keys}: the model is a {model.config.model_type}, which has no experts; leave the section out, or take a "
            "family that has (mixtral, qwen3_moe), e.g. by `nanoworks upcycle`"
        )
    return None


def _mixtures(model: Decoder) -> dict[int, MoE]:
    """The mixtures of the whole model by layer, on the meta device."""
    with torch.device("meta"):
        modules = build_model(model.config).modules()
    return {module.layer: module for module in modules if isinstance(module, MoE)}


def utilisation_entropy(shares: Sequence[float]) -> float:
    """Entropy of the `shares` that experts have of the choices, over its highest value, log E: between 0 and 1."""
    entropy = -sum(share * math.log(share) for share in shares if share > 0)
    return entropy / math.log(len(shares)) if len(shares) > 1 else 1.0


def _ends(start: float, final: float | None) -> tuple[float, float]:
    return start, start if final is None else final


def _gradual(start: int | None, end: int, steps: int, step: int) -> int | None:
    """A whole number on the line from `start` at step 0 to `end` at `steps`; None where nothing differs from `end`."""
    if start is None or step >= steps:
        return None
    return start + math.trunc((end - start) * step / steps)


def _check(section: MoeSection, num_experts: int, top_k: int) -> None:
    if (start := section.active_experts_start) is not None and start > num_experts:
        raise UserError(f"moe.active_experts_start is {start}, but there are {num_experts} experts; give at most that")
    if (start := section.open_experts_start) is not None and not top_k <= start <= num_experts:
        raise UserError(
            f"moe.open_experts_start is {start}; a token goes to {top_k} experts of {num_experts}, so give a number "
            f"from {top_k} to {num_experts}"
        )
