"""Medusa: heads on the model's last hidden state guess the next tokens, several guesses a place, as a tree
(https://arxiv.org/abs/2401.10774).

The tree is fixed: of all paths of guesses, those that are likeliest to be right by the heads' measured accuracy are in
it, best first, so that its first n tokens are the best tree of n. All its branches are verified in one step.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence as ListOf
from typing import ClassVar

import torch

from nanoworks.checkpoint.medusa import Ranks, SavedHeads
from nanoworks.engine.sequence import Draft, Sequence
from nanoworks.models import Decoder

_GUESSED: Ranks = [[0.6 * 0.8**k * 0.3**rank for rank in range(8)] for k in range(16)]
"""What heads are taken to be worth when nothing was measured."""


class MedusaProposer:
    """Args:
    model: the backbone.
    size: most tokens of a tree.
    vocab_size: tokens that may be proposed are below this.
    """

    needs_hidden: ClassVar[bool] = True

    def __init__(self, saved: SavedHeads, model: Decoder, *, size: int, vocab_size: int) -> None:
        self.heads, self.model, self.vocab_size = saved.heads, model, vocab_size
        ranks = saved.ranks or _GUESSED
        self.tree = best_tree([r[:vocab_size] for r in ranks[: self.heads.num_heads]], size)
        self._width = 1 + max(rank for _, _, rank in self.tree)

    @torch.no_grad()
    def propose(self, sequences: ListOf[Sequence], limits: ListOf[int]) -> list[Draft | None]:
        drafts: list[Draft | None] = [None] * len(sequences)
        # A sequence has no hidden state yet when its newest token was not sampled here (the end of a prompt).
        able = [i for i, s in enumerate(sequences) if limits[i] and s.hidden is not None]
        if not able:
            return drafts
        hidden = torch.stack([h for i in able if (h := sequences[i].hidden) is not None])
        logits = self.heads.logits(hidden, self.model.head)[..., : self.vocab_size]
        guesses: list[list[list[int]]] = logits.topk(self._width).indices.tolist()  # (able, heads, ranks)
        for i, guess in zip(able, guesses, strict=True):
            nodes = self.tree[: limits[i]]
            drafts[i] = Draft([guess[depth][rank] for _, depth, rank in nodes], [parent for parent, _, _ in nodes])
        return drafts

    def release(self, sequence: Sequence) -> None:
        pass


def best_tree(ranks: Ranks, size: int) -> list[tuple[int, int, int]]:
    """Return up to `size` nodes (parent, head, rank), parents before children: the paths likeliest to be right.

    `ranks[k][r]` is how often guess r of head k is right, by which a path is worth the product over its nodes. This is
    the paper's greedy construction; the first n nodes are the best tree of n.
    """
    nodes: list[tuple[int, int, int]] = []
    # Siblings come in falling order of worth, so a heap of the next sibling and the first child suffices.
    falling = [sorted(range(len(r)), key=lambda i, r=r: -r[i]) for r in ranks]  # type: ignore[misc]
    heap = [(-ranks[0][falling[0][0]], 0, -1, 0, 1.0)]  # (-worth, head, parent, place among siblings, worth of parent)
    while heap and len(nodes) < size:
        worth, head, parent, place, base = heapq.heappop(heap)
        nodes.append((parent, head, falling[head][place]))
        if place + 1 < len(falling[head]):
            heapq.heappush(heap, (-base * ranks[head][falling[head][place + 1]], head, parent, place + 1, base))
        if head + 1 < len(ranks):
            best = ranks[head + 1][falling[head + 1][0]]
            heapq.heappush(heap, (worth * best, head + 1, len(nodes) - 1, 0, -worth))
    return nodes
