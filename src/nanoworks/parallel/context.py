"""Context parallelism: ranks share the tokens of each row, so that rows may be longer than one device can train on.

Everything but attention works on one token at a time and is left as it is. A hook on the decoder gives it this rank's
tokens and a context that knows their places in the row; its `attend` talks to the other ranks, in one of two ways:

- "all_gather": every rank gets the keys and values of the row and attends with its own queries. It has the r-th part
  from the beginning and the r-th from the end, because early tokens see few others and late ones many
  (https://arxiv.org/abs/2407.21783, section 3.3.2).
- "ulysses": tokens are exchanged for heads, so that a rank attends over the whole row with its share of the heads, and
  back (https://arxiv.org/abs/2309.14509). Less is sent, but ranks must divide the key/value heads.

What leaves the model is of whole rows and the same on every rank: the loss, log-probabilities, what routers did. So the
gradient on a rank is that of its tokens, and over the ranks they add up to the row's. All this is in training only: in
evaluation, where each rank may have a model for itself, every rank computes whole rows.

Shapes: B rows, T tokens a row, t = T / ranks of this rank, H query heads, K key/value heads, D features a head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nanoworks.common.errors import UserError
from nanoworks.models import Decoder
from nanoworks.nn import functional as NF
from nanoworks.nn.context import PLAIN, Attending, DenseContext, Window
from nanoworks.nn.moe import MoE, Routing
from nanoworks.parallel import collectives as C

TOKENS = 1
"""The dimension of tokens in (B, T, ...)."""


def share_rows(model: Decoder, group: Any, *, method: str, tensor: int = 1) -> None:
    """Make `model` train in place on shares of its rows; the ranks of `group` give it the same rows.

    Args:
        method: "all_gather" or "ulysses".
        tensor: ranks that share its heads already.

    Raises:
        UserError: with "ulysses", heads that cannot be shared; from forward, rows that cannot.
    """
    shares = Shares(group, halves=method == "all_gather")
    if method == "ulysses":
        _check_heads(model, shares.n, tensor)
    kind = _GatheringContext if method == "all_gather" else _ExchangingContext

    def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not module.training:
            return None
        tokens, ctx = args
        check_rows(tokens.size(-1), shares.n, method)
        return shares.take(tokens), kind(ctx, shares)

    def leave(_: nn.Module, args: tuple[Any, ...], __: Tensor) -> None:
        if isinstance(args[1], _SharedContext):
            args[1].leave_routing()

    model.register_forward_pre_hook(enter)
    model.register_forward_hook(leave)
    _share_head(model.head, shares)
    for module in model.modules():
        if isinstance(module, MoE):
            # The class changes in place, as in tensor_training: names, hooks and the identity of the module stay.
            module.__class__ = _SharedRows
            module.shares = shares  # type: ignore[assignment]


def check_rows(length: int, ranks: int, method: str) -> None:
    """UserError when rows of `length` tokens cannot be shared by so many ranks."""
    parts = 2 * ranks if method == "all_gather" else ranks
    if length % parts:
        raise UserError(
            f"parallel.context={ranks}: rows of {length} tokens cannot be cut into {parts} equal parts; set "
            f"data.sequence_length={max(1, length // parts) * parts}, or another multiple of {parts}"
        )


class Shares:
    """Which tokens of a row each rank of `group` has: one part of it, or with `halves` two, one from either end."""

    def __init__(self, group: Any, *, halves: bool) -> None:
        self.group, self.n, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        self.parts = self.n * (1 + halves)
        owned = [(r, self.parts - 1 - r) if halves else (r,) for r in range(self.n)]
        self._own = owned[self.rank]
        by_rank = [part for parts in owned for part in parts]
        self._order = sorted(range(self.parts), key=by_rank.__getitem__)

    def spans(self, length: int) -> list[slice]:
        """Where in a row of `length` tokens this rank's are."""
        size = length // self.parts
        return [slice(part * size, (part + 1) * size) for part in self._own]

    def take(self, x: Tensor, dim: int = TOKENS) -> Tensor:
        """This rank's tokens of whole rows."""
        spans = self.spans(x.size(dim))
        return torch.cat([x.narrow(dim, span.start, span.stop - span.start) for span in spans], dim)

    def whole(self, x: Tensor, *, partial: bool = False) -> Tensor:
        """Whole rows from the ranks' tokens (B, t, ...); `partial` as for `gather_in`."""
        gathered = C.gather_in(x, self.group, TOKENS, partial=partial)
        if self.parts == self.n:
            return gathered
        pieces = gathered.chunk(self.parts, TOKENS)
        return torch.cat([pieces[i] for i in self._order], TOKENS)


class _SharedContext:
    """A `ForwardContext` of this rank's tokens of `whole`, which is of whole rows."""

    def __init__(self, whole: DenseContext, shares: Shares) -> None:
        self.whole, self.shares = whole, shares
        self.positions = shares.take(whole.positions, 0)
        self.prev_tokens = shares.take(whole.prev_tokens)
        self.lengths = whole.lengths
        self.routing: dict[int, Routing] | None = None if whole.routing is None else {}

    def leave_routing(self) -> None:
        """Give to `whole` what the routers of all ranks did, in the order of its tokens."""
        if not self.routing or self.whole.routing is None:
            return
        found, rows = list(self.routing.values()), self.prev_tokens.size(0)

        def whole(tensors: list[Tensor]) -> list[Tensor]:  # of all layers in one message
            together = torch.stack(tensors, dim=1).unflatten(0, (rows, -1))
            return list(self.shares.whole(together).flatten(0, 1).unbind(1))

        logits, experts = whole([r.logits for r in found]), whole([r.experts for r in found])
        counts = torch.stack([torch.stack([r.overflow, r.dropped]) for r in found])
        for i, (over, dropped) in enumerate(C.all_reduced(counts, self.shares.group)):
            layer = list(self.routing)[i]
            self.whole.routing[layer] = replace(
                found[i], logits=logits[i], experts=experts[i], overflow=over, dropped=dropped
            )


class _GatheringContext(_SharedContext):
    def __init__(self, whole: DenseContext, shares: Shares) -> None:
        super().__init__(whole, shares)
        self._masks: dict[tuple[Window | None, int], Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, how: Attending = PLAIN) -> Tensor:
        k, v = self.shares.whole(torch.cat([k, v], -1), partial=True).split([k.size(-1), v.size(-1)], -1)
        spans = self.shares.spans(k.size(TOKENS))
        window, scale, softcap, sinks = how
        plain = how.plain and self.whole.documents is None
        plain = plain and (window is None or window.size >= k.size(TOKENS))
        parts = []
        for queries, span in zip(q.chunk(len(spans), TOKENS), spans, strict=True):
            keys, values = k[:, : span.stop], v[:, : span.stop]  # nobody sees what comes after
            if plain:
                parts.append(_attention_of_last(queries, keys, values, scale))
                continue
            if (window, span.start) not in self._masks:
                self._masks[window, span.start] = self.whole.mask(window, span)[..., : span.stop]
            mask = self._masks[window, span.start]
            parts.append(NF.masked_attention(queries, keys, values, mask, scale=scale, softcap=softcap, sinks=sinks))
        return torch.cat(parts, TOKENS)


class _ExchangingContext(_SharedContext):
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, how: Attending = PLAIN) -> Tensor:
        n, group = self.shares.n, self.shares.group
        heads = [x.size(2) // n for x in (q, k, v)]
        grouped = torch.cat([x.unflatten(2, (n, -1)) for x in (q, k, v)], 3)  # (B, t, n, heads of one rank, D)
        rows = C.exchange(grouped.movedim(2, 0), group).movedim(0, 1).flatten(1, 2)
        q, k, v = rows.split(heads, 2)
        if how.sinks is not None:
            how = how._replace(sinks=how.sinks.chunk(n)[self.shares.rank])
        y = self.whole.attend(layer, q, k, v, how)
        back = C.exchange(y.unflatten(1, (n, -1)).movedim(1, 0), group)  # (n, B, t, heads of one rank, D)
        return back.movedim(0, 2).flatten(2, 3)


def _attention_of_last(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Causal attention whose queries (B, t, H, D) are the last of the tokens of k and v."""
    from torch.nn.attention.bias import causal_lower_right  # on a GPU its kernels need no mask in memory

    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    mask: Any = causal_lower_right(q.size(2), k.size(2))
    grouped = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped).transpose(1, 2)


class _SharedRows(MoE):
    """An expert has room for so many of the rows' tokens, whichever ranks have them."""

    shares: Shares
    rows: int

    def forward(self, x: Tensor, ctx: Any) -> Tensor:
        self.rows = x.size(0)
        return super().forward(x, ctx)

    def _over_capacity(self, experts: Tensor, factor: float) -> Tensor:
        chosen = self.shares.whole(experts.unflatten(0, (self.rows, -1)))
        over = super()._over_capacity(chosen.flatten(0, 1), factor)
        return self.shares.take(over.unflatten(0, (self.rows, -1))).flatten(0, 1)


def _share_head(head: Any, shares: Shares) -> None:
    """Its losses take this rank's hidden states (B, t, C) and the targets of whole rows (B, T)."""
    loss, logprobs = head.loss, head.logprobs

    def shared_loss(hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        if hidden.shape[:-1] == targets.shape:
            return loss(hidden, targets, weights)
        return C.sum_out(loss(hidden, shares.take(targets), shares.take(weights)), shares.group)

    def shared_logprobs(hidden: Tensor, targets: Tensor) -> Tensor:
        if hidden.shape[:-1] == targets.shape:
            return logprobs(hidden, targets)
        return shares.whole(logprobs(hidden, shares.take(targets)))

    head.loss, head.logprobs = shared_loss, shared_logprobs


def _check_heads(model: Decoder, n: int, tensor: int) -> None:
    heads = model.config.num_key_value_heads // tensor
    if heads % n or model.config.num_attention_heads // tensor % n:
        each = f"{heads} key/value heads" + (f" of each of {tensor} tensor ranks" if tensor > 1 else "")
        raise UserError(
            f"parallel.context={n}: ulysses cannot share the {each}; set parallel.context_method=all_gather, or take "
            f"parallel.context={' or '.join(str(d) for d in range(1, heads + 1) if heads % d == 0)}"
        )
