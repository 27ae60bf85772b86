"""nanochat's optimizer of 2026: a Muon whose update is evened out and decays with caution, and an AdamW with its own
betas and decay for every other role.

What is new in the update of a matrix, in order:
- the rows of the momentum are brought to one length first (https://arxiv.org/abs/2603.28254);
- the polar factor comes from the Polar Express iteration (https://arxiv.org/abs/2505.16932) and gets the norm that
  an exact one would have (https://arxiv.org/abs/2602.21545);
- it is divided by a running root mean square a row or, in wide matrices, a column, and keeps its norm in that
  (NorMuon, https://arxiv.org/abs/2510.05491);
- weight decay touches only the entries that the update moves towards zero (https://arxiv.org/abs/2510.12402).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import Parameter

from nanoworks.common.device import choose_dtype
from nanoworks.common.errors import UserError
from nanoworks.parallel.shards import is_sharded
from nanoworks.train.muon import Muon
from nanoworks.train.optim import OPTIMIZERS, AdamW, Optimizer, ParamGroups, whole
from nanoworks.train.schedule import rise

# From the paper: the best odd quintics in a row, for five of them, a safety factor of 0.02 and a cushion of 2.
_POLYNOMIALS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


class _Rule(NamedTuple):
    """How AdamW treats a role: its rate over that of `Options.<lr>`, its betas and its decay."""

    lr: Literal["lr_embedding", "lr_unembedding", "lr_scalar", "lr_smear"]
    factor: float
    betas: tuple[float, float]
    weight_decay: float


_RULES = {
    "unembedding": _Rule("lr_unembedding", 1.0, (0.8, 0.96), 0.01),
    "embedding": _Rule("lr_embedding", 1.0, (0.8, 0.995), 0.001),
    "embedding.value": _Rule("lr_embedding", 0.5, (0.8, 0.995), 0.01),
    "other": _Rule("lr_scalar", 0.01, (0.8, 0.95), 0.0),
    "other.residual": _Rule("lr_scalar", 0.01, (0.8, 0.95), 0.05),
    "other.skip": _Rule("lr_scalar", 1.0, (0.96, 0.95), 0.0),
    "other.smear": _Rule("lr_smear", 1.0, (0.8, 0.95), 0.0),
}


def polar_express(x: Tensor) -> Tensor:
    """Return about U V^T of the singular value decomposition U S V^T of each matrix of x (n, rows, cols).

    The arithmetic is of x's dtype. A matrix of zeros stays one.
    """
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT.contiguous()
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) * 1.01 + 1e-6)
    for a, b, c in _POLYNOMIALS:
        s = torch.bmm(x, x.mT)
        polynomial = torch.bmm(c * s, s).add_(b * s)
        x = torch.bmm(polynomial, x).add_(a * x)
    return x.mT if tall else x


class NorMuon(Muon):
    """The Muon of this module over named matrices; `dtype` is that of the Polar Express."""

    def __init__(self, parameters: Sequence[tuple[str, Parameter]], *, beta2: float, dtype: torch.dtype) -> None:
        if any(is_sharded(p) for _, p in parameters):
            raise UserError(
                "muon_adamw_2026 keeps means of whole rows and columns, so it trains whole matrices only; set "
                "parallel.shard=1 and parallel.replicate to the number of ranks, or optim.name=muon_adamw"
            )
        super().__init__(parameters)
        self._beta2, self._dtype = beta2, dtype
        self._squares = [momentum.new_zeros(_one_line(momentum).shape) for _, momentum in self._stacks]

    @torch.no_grad()
    def step(self, lr: float, momentum: float, weight_decay: float = 0.0) -> None:
        """Update every parameter; one with more rows than columns takes sqrt(rows / cols) times `lr`."""
        for (members, buffer), squares in zip(self._stacks, self._squares, strict=True):
            grads = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for _, p in members])
            buffer.lerp_(grads, 1 - momentum)
            each = grads.lerp_(buffer, momentum).flatten(0, -3)  # a stack of experts is so many matrices
            update = self._even(self._orthogonal(each), squares.flatten(0, -3)).view_as(buffer)
            rows, cols = update.shape[-2:]
            rate = lr * max(1.0, rows / cols) ** 0.5
            for (_, p), u in zip(members, update, strict=True):
                towards_zero = u * p >= 0
                p.sub_(u.add_(weight_decay * p * towards_zero), alpha=rate)

    def squares(self) -> dict[str, Tensor]:
        """Return the running mean squares of each parameter's update by name: the state itself, not a copy."""
        pairs = zip(self._stacks, self._squares, strict=True)
        return {name: squares[i] for (members, _), squares in pairs for i, (name, _) in enumerate(members)}

    def _orthogonal(self, g: Tensor) -> Tensor:
        x = g.to(self._dtype)
        rows = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        mean = torch.linalg.vector_norm(rows, dim=-2, keepdim=True) / x.size(-2) ** 0.5
        u = polar_express(x * (mean / rows.clamp_min(1e-6)).to(x.dtype)).to(g.dtype)
        norm = torch.linalg.vector_norm(u, dim=(-2, -1), keepdim=True)
        return u * (min(u.shape[-2:]) ** 0.5 / norm.clamp_min(1e-6))

    def _even(self, u: Tensor, squares: Tensor) -> Tensor:
        now = _one_line(u.square())
        squares.lerp_(now, 1 - self._beta2)
        factor = squares.clamp_min(1e-10).rsqrt()
        # Each line holds equally many entries, so their number drops out of the ratio of the norms.
        before = now.sum(dim=(-2, -1), keepdim=True).sqrt()
        after = (now * factor.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
        return u * (factor * (before / after.clamp_min(1e-10)))


def _one_line(x: Tensor) -> Tensor:
    """Mean of each row (n, rows, 1), or of each column (n, 1, cols) where a matrix is wider than high."""
    return x.mean(dim=-1 if x.size(-2) >= x.size(-1) else -2, keepdim=True)


@OPTIMIZERS.register("muon_adamw_2026")
class MuonAdamW2026(AdamW):
    """Muon for the matrices inside the layers, AdamW for the rest, as nanochat does since 2026.

    Its momentum falls again while the learning rate does, and its weight decay falls over the whole run.
    """

    matrix_state_bytes = 4
    whole_matrices = True

    class Options(Optimizer.Options):
        lr_matrix: float = Field(default=0.02, gt=0, description="Muon's rate")
        lr_embedding: float = Field(
            default=0.3, gt=0, description="AdamW's rate for the embedding; a value embedding takes half of it"
        )
        lr_unembedding: float = Field(default=0.008, gt=0, description="AdamW's rate for the head")
        lr_scalar: float = Field(
            default=0.5, gt=0, description="AdamW's rate for skip scalars; norms and residual scalars take 1% of it"
        )
        lr_smear: float = Field(default=0.2, gt=0, description="AdamW's rate for smear and backout")
        scale_lr_by_width: bool = Field(
            default=True,
            description="multiply the rates of embeddings and head by (hidden_size / 768) ** -0.5; tuned at 768",
        )
        eps: float = Field(default=1e-10, gt=0)
        weight_decay: float = Field(
            default=0.28, ge=0, description="of the matrices inside the layers at step 0; half a cosine takes it to 0"
        )
        momentum_start: float = Field(default=0.85, ge=0, lt=1, description="Muon's momentum at step 0")
        momentum: float = Field(default=0.97, ge=0, lt=1, description="Muon's momentum after its warmup")
        momentum_end: float = Field(default=0.90, ge=0, lt=1, description="Muon's momentum at the end of the run")
        momentum_warmup_steps: int = Field(default=400, ge=0, description="steps until `momentum` is reached")
        momentum_warmdown_ratio: float = Field(
            default=0.65, ge=0, le=1, description="share of the run over which it goes to `momentum_end`"
        )
        beta2: float = Field(default=0.9, ge=0, lt=1, description="memory of the running mean squares of Muon's update")
        polar_dtype: Literal["auto", "bfloat16", "float32"] = Field(
            default="auto", description="of the orthogonalisation. auto: float32 on a CPU, else bfloat16"
        )

    def __init__(self, groups: ParamGroups, options: Options) -> None:
        self.options = options
        table = (groups["embedding"] or groups["matrix"])[0][1]  # a pipeline stage may have no embedding
        rules = {role: _RULES.get(role, _RULES[whole(role)]) for role in groups if whole(role) != "matrix"}
        lrs = {role: getattr(options, rule.lr) * rule.factor * options.lr_fraction for role, rule in rules.items()}
        if options.scale_lr_by_width:
            for role in lrs:
                if whole(role) in ("embedding", "unembedding"):
                    lrs[role] *= (table.size(-1) / 768) ** -0.5
        self._start(
            {role: groups[role] for role in rules},
            lrs=lrs,
            decays={role: rule.weight_decay for role, rule in rules.items()},
            betas={role: rule.betas for role, rule in rules.items()},
            eps=options.eps,
        )
        dtype = choose_dtype(options.polar_dtype, table.device)
        self._muons = {}
        for role in groups.keys() - rules.keys():
            self.lrs[role] = options.lr_matrix * options.lr_fraction
            self._muons[role] = NorMuon(groups[role], beta2=options.beta2, dtype=dtype)

    def step(self, lr_scale: float, step: int) -> None:
        assert self.total_steps is not None, "set total_steps before the first step: momentum and decay follow it"
        super().step(lr_scale, step)
        for role, muon in self._muons.items():
            muon.step(
                self.lrs[role] * lr_scale,
                momentum_at(step, self.total_steps, self.options),
                weight_decay_at(step, self.total_steps, self.options),
            )

    def zero_grad(self) -> None:
        super().zero_grad()
        for muon in self._muons.values():
            muon.zero_grad()

    def state_dict(self) -> dict[str, Tensor]:
        state = super().state_dict()
        for muon in self._muons.values():
            state |= {f"{name}.momentum": value for name, value in muon.momentum().items()}
            state |= {f"{name}.mean_square": value for name, value in muon.squares().items()}
        return state


def momentum_at(step: int, total_steps: int, options: MuonAdamW2026.Options) -> float:
    """Muon's momentum: up in a straight line, level, and down with the learning rate. The rise goes first where a
    short run has no room for both."""
    if step < options.momentum_warmup_steps:
        return rise(options.momentum_start, options.momentum, options.momentum_warmup_steps, step)
    warmdown = round(options.momentum_warmdown_ratio * total_steps)
    falling = step - (total_steps - warmdown)
    if falling < 0 or warmdown == 0:
        return options.momentum
    return rise(options.momentum, options.momentum_end, warmdown, falling)


def weight_decay_at(step: int, total_steps: int, options: MuonAdamW2026.Options) -> float:
    """Muon's weight decay: half a cosine from `weight_decay` at step 0 to 0 at the end."""
    return options.weight_decay * 0.5 * (1 + math.cos(math.pi * step / total_steps))
