"""An optimizer whose state lies in flat pieces over the ranks, by parameter name all the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from nanoworks.common.errors import UserError

if TYPE_CHECKING:
    from nanoworks.parallel.deepspeed import DeepSpeed


class Pieces:
    """What the trainer and the saver use of an optimizer, where the engine steps pieces of parameters."""

    def __init__(self, strategy: DeepSpeed, rule: torch.optim.Optimizer, optimizer: Any) -> None:
        self._strategy, self._rule = strategy, rule
        self.lrs: dict[str, float] = optimizer.lrs
        self.total_steps: int | None = optimizer.total_steps
        for piece in strategy.pieces:
            self._rule.state[piece] = {
                "step": torch.zeros((), dtype=torch.float32, device=piece.device),
                "exp_avg": torch.zeros_like(piece),
                "exp_avg_sq": torch.zeros_like(piece),
            }
        if strategy.section.zero_stage < 3:
            strategy.zero._lazy_init_hp_params_optimizer_state()
        self._names = [name for name, p in strategy.parameters.items() if p.requires_grad]

    def step(self, lr_scale: float, step: int) -> None:
        for group in self._rule.param_groups:
            group["lr"] = self.lrs[group["role"]] * lr_scale
        self._strategy.engine.step()

    def zero_grad(self) -> None:
        self._strategy.zero.zero_grad()

    def state_dict(self) -> dict[str, Tensor]:
        """Stand-ins, which the strategy's `wholes` reads."""
        step = self._rule.state[self._strategy.pieces[0]]["step"]
        state: dict[str, Tensor] = {}
        for name in self._names:
            parameter = self._strategy.parameters[name]
            state[f"{name}.step"] = step
            for key in ("exp_avg", "exp_avg_sq"):
                state[f"{name}.{key}"] = Elsewhere.of(self._strategy, parameter, key)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        own = self.state_dict()
        wrong = sorted(own.keys() ^ state.keys())
        for key, stand_in in own.items() if not wrong else ():
            saved = state[key]  # which may be read from a file here: one is held at a time
            if saved.shape != stand_in.shape:
                wrong = [key]
                break
            if isinstance(stand_in, Elsewhere):
                stand_in.write(saved)
            else:
                for piece in self._strategy.pieces:
                    self._rule.state[piece]["step"].copy_(saved)
        if wrong:
            raise UserError(
                f"the saved optimizer state is not of this model and optimizer: {len(wrong)} tensors differ, "
                f"the first is {wrong[0]!r}; resume with the recipe the run was started with"
            )


class Elsewhere(Tensor):
    """The shape of what the optimizer keeps of a parameter, without memory; ranks together read and write it."""

    _strategy: DeepSpeed
    _parameter: Parameter
    _key: str

    @staticmethod
    def of(strategy: DeepSpeed, parameter: Parameter, key: str) -> Elsewhere:
        found = torch.zeros(()).expand(size_of(parameter)).as_subclass(Elsewhere)
        found._strategy, found._parameter, found._key = strategy, parameter, key
        return found

    def read(self) -> Tensor:
        return self._strategy.whole(self._parameter, self._key)

    def write(self, value: Tensor) -> None:
        utils = self._strategy.utils
        utils.safe_set_full_optimizer_state(self._parameter, value.to(self._strategy.device), self._key)


def size_of(parameter: Parameter) -> torch.Size:
    """The shape of the whole parameter; where stage 3 has cut it, only DeepSpeed knows."""
    return getattr(parameter, "ds_shape", parameter.shape)
