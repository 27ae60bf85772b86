"""What routers of experts did, as one tensor that goes from one pipeline stage to the next.

The losses of routers are made at the end of the model from `ctx.routing`, of all layers together. So each stage hands
over the routing of all layers up to its end, and the gradients of the logits come back the same way. A row is a layer:
logits, choices, choices beyond capacity, those dropped, which experts were closed (-1: nobody asked).

Shapes: N tokens of a micro-batch, E experts, k experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanoworks.models import Decoder
from nanoworks.nn.context import ForwardContext
from nanoworks.nn.moe import MoE, Routing


@dataclass(frozen=True)
class Routers:
    """The layers of a whole model that have experts."""

    layers: tuple[int, ...]
    num_experts: int
    top_k: int

    @classmethod
    def of(cls, model: Decoder) -> Routers:
        found = [module for module in model.modules() if isinstance(module, MoE)]
        if not found:
            return cls((), 0, 0)
        return cls(tuple(sorted(m.layer for m in found)), found[0].num_experts, found[0].top_k)

    def choices(self, model: Decoder) -> int:
        """k as the present rules have it, read from this rank's layers; the model's where it has none with experts."""
        here = (module for module in model.modules() if isinstance(module, MoE))
        return next((m.rules.top_k or m.top_k if model.training else m.top_k for m in here), self.top_k)

    def empty(self, until: int, tokens: int, top_k: int) -> tuple[Tensor, ...]:
        """The tensor that is handed over before layer number `until`, on the meta device; none before the first."""
        rows = sum(layer < until for layer in self.layers)
        if not rows:
            return ()
        width = tokens * (self.num_experts + top_k) + 2 + self.num_experts
        return (torch.empty(rows, width, device="meta", requires_grad=True),)

    def pack(self, ctx: ForwardContext) -> tuple[Tensor, ...]:
        """All that is in `ctx.routing`, in the order of the layers."""
        if not ctx.routing:
            return ()
        return (torch.stack([_row(ctx.routing[layer]) for layer in sorted(ctx.routing)]),)

    def unpack(self, packed: Tensor, tokens: int, ctx: ForwardContext) -> None:
        """Put what `pack` made into `ctx.routing`."""
        E = self.num_experts
        assert ctx.routing is not None
        top_k = (packed.size(1) - 2 - E) // tokens - E
        for layer, row in zip(self.layers, packed, strict=False):  # only those of earlier stages are in it
            logits, experts, overflow, dropped, closed = row.split([tokens * E, tokens * top_k, 1, 1, E])
            ctx.routing[layer] = Routing(
                logits.view(tokens, E),
                experts.detach().view(tokens, top_k).long(),
                overflow=overflow.detach().long().squeeze(),
                dropped=dropped.detach().long().squeeze(),
                closed=closed.detach() > 0,
            )


def _row(r: Routing) -> Tensor:
    none = r.logits.new_full((r.logits.size(1),), -1.0)
    closed = none if r.closed is None else r.closed.float()
    counts = torch.stack([r.overflow, r.dropped])
    return torch.cat([r.logits.flatten(), r.experts.flatten().float(), counts.float(), closed])
