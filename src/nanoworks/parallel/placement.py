"""Which experts are neighbours on a rank: an order in which expert ranks get about the same work, from a run's use.

Ranks hold as many experts each, but routers do not use experts alike, and a layer waits for its busiest rank. Experts
have no order of their own: numbered otherwise, in the router as in the stacks, they make the same model. So placement
is a new numbering, done before a model is spread; checkpoints and later runs simply have it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from nanoworks.common.errors import UserError
from nanoworks.models import Decoder
from nanoworks.nn.moe import MoE

log = logging.getLogger("nanoworks")

USE_FILE = "experts.jsonl"
_LAST_ROWS = 10  # of about a hundred that a run writes: how experts are used changes most at the beginning


def place_experts(model: Decoder, run: Path, ranks: int) -> None:
    """Number the experts of `model`, which this process holds whole, as suits `ranks` expert ranks.

    Args:
        run: a run's directory, or a file like its `experts.jsonl`.

    Raises:
        UserError: there is no such file, or it is of a model with other experts.
    """
    shares = read_use(run)
    mixtures = {module.layer: module for module in model.modules() if isinstance(module, MoE)}
    numbers = {layer: module.num_experts for layer, module in mixtures.items()}
    if {layer: len(share) for layer, share in shares.items()} != numbers:
        raise UserError(
            f"parallel.expert_placement={run} is of a model with other experts (layer: number) "
            f"{ {layer: len(share) for layer, share in shares.items()} } than this one's {numbers}; give a run of this "
            "model, or leave it out"
        )
    before = sum(imbalance(share, ranks) for share in shares.values()) / len(shares)
    orders = {layer: balanced_order(share, ranks) for layer, share in shares.items()}
    renumber(mixtures, orders)
    after = sum(imbalance([shares[i][e] for e in order], ranks) for i, order in orders.items()) / len(orders)
    log.info("experts placed by %s: the busiest of %d ranks has %.2f of the mean, not %.2f", run, ranks, after, before)


def read_use(run: Path) -> dict[int, list[float]]:
    """Layer -> each expert's share of the choices, the mean over the last rows of a run's file.

    Raises:
        UserError: there is no such file, or it is none of a run's.
    """
    file = run / USE_FILE if run.is_dir() else run
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()][-_LAST_ROWS:]
        layers: list[int] = rows[-1]["layers"]
        shares = torch.tensor([row["shares"] for row in rows], dtype=torch.float64).mean(0)
        return dict(zip(layers, shares.tolist(), strict=True))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"parallel.expert_placement: {file} does not tell how a run used its experts ({type(error).__name__}: "
            f"{error}); give the directory of a run with experts, which has {USE_FILE}"
        ) from None


def balanced_order(shares: Sequence[float], ranks: int) -> list[int]:
    """Numbers of experts, those of rank 0 first, then those of rank 1, ..., as many each.

    The busiest expert goes first, each to the rank with the least so far that has room
    (https://doi.org/10.1137/0117039). Where that is no better than 0, 1, 2, ..., nothing moves.
    """
    room = len(shares) // ranks
    members: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for expert in sorted(range(len(shares)), key=lambda e: -shares[e]):
        rank = min((r for r in range(ranks) if len(members[r]) < room), key=lambda r: loads[r])
        members[rank].append(expert)
        loads[rank] += shares[expert]
    found = [expert for group in members for expert in sorted(group)]
    return min(list(range(len(shares))), found, key=lambda order: imbalance([shares[e] for e in order], ranks))


def imbalance(shares: Sequence[float], ranks: int) -> float:
    """The work of the busiest rank over the mean, with experts in their order: 1 is even, `ranks` the worst."""
    size = len(shares) // ranks
    return max(sum(shares[i : i + size]) for i in range(0, len(shares), size)) * ranks / (sum(shares) or 1.0)


@torch.no_grad()
def renumber(mixtures: Mapping[int, MoE], orders: Mapping[int, Sequence[int]]) -> None:
    """Give the experts of each layer the numbers of their places in its order; the block computes the same."""
    for layer, order in orders.items():
        mixture = mixtures[layer]
        leaves = mixture.experts.gate_proj, mixture.experts.up_proj, mixture.experts.down_proj
        for parameter in (mixture.gate.weight, mixture.e_score_correction_bias, *(leaf.weight for leaf in leaves)):
            if parameter is not None:
                parameter.copy_(parameter[list(order)])
