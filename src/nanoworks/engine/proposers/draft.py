"""A draft model: a smaller model of the same vocabulary guesses greedily, the engine's model verifies
(https://arxiv.org/abs/2211.17192).

It has a paged KV cache of its own, in which every engine sequence has a shadow. A shadow may be ahead of its sequence,
by drafted tokens that were rejected, or behind it, by tokens the model chose itself, forced ones, or a whole prompt;
`propose` keeps what the two have in common, computes the rest and then drafts. Where blocks run out, the shadow that
was longest unused gives up its own and starts over when its sequence is drafted for again.
"""

from __future__ import annotations

from collections.abc import Sequence as ListOf
from dataclasses import dataclass
from typing import ClassVar

import torch

from nanoworks.common.device import memory_bytes
from nanoworks.common.errors import UserError
from nanoworks.engine.batch import build_batch
from nanoworks.engine.block_manager import BlockChanges, BlockManager
from nanoworks.engine.proposers import chain
from nanoworks.engine.request import Request
from nanoworks.engine.runner import Runner
from nanoworks.engine.scheduler import Chunk, Schedule
from nanoworks.engine.sequence import Draft, Sequence
from nanoworks.models import Decoder
from nanoworks.nn.paged import KVShape
from nanoworks.tokenizer import Tokenizer

_MEMORY_SHARE = 16
"""A draft model's cache takes at most this part of the memory."""


@dataclass
class _Shadow:
    twin: Sequence
    """Tokens and blocks in the draft model's cache."""
    known: int = 0
    """So many of the twin's tokens are certainly its sequence's, which only grows."""


class DraftModelProposer:
    """Args:
    model: the draft model.
    vocab_size: tokens that may be proposed are below this.
    max_num_seqs, max_batch_tokens, block_size: as the engine's.
    """

    needs_hidden: ClassVar[bool] = False

    def __init__(
        self,
        model: Decoder,
        *,
        vocab_size: int,
        max_num_seqs: int,
        max_batch_tokens: int,
        block_size: int,
    ) -> None:
        self.model, self.vocab_size = model, vocab_size
        self.block_size, self.max_batch_tokens = block_size, max_batch_tokens
        device = model.embed_tokens.weight.device
        shape = KVShape.of(model, device)
        self.max_context = model.config.max_position_embeddings
        wanted = max_num_seqs * -(-self.max_context // block_size)
        held = memory_bytes(device) // _MEMORY_SHARE // (shape.bytes_per_token * block_size)
        num_blocks = max(1, min(wanted, held)) + 1  # and the null block
        self._blocks = BlockManager(num_blocks, block_size)
        self._runner = Runner(model, shape, num_blocks=num_blocks, block_size=block_size)
        self._shadows: dict[Sequence, _Shadow] = {}  # the one longest unused first

    def propose(self, sequences: ListOf[Sequence], limits: ListOf[int]) -> list[Draft | None]:
        lengths = [len(s.ids) for s in sequences]
        # The last drafted token is never computed, so it may be one beyond the draft model's context.
        limits = [max(0, min(n, self.max_context - size + 1)) for n, size in zip(limits, lengths, strict=True)]
        active = {i: self._follow(sequences[i]) for i, limit in enumerate(limits) if limit}
        held = set(active.values())
        for i, twin in list(active.items()):
            if not self._reserve(twin, limits[i], held):
                held.discard(active.pop(i))
        while any(twin.num_computed < len(twin.ids) - 1 for twin in active.values()):
            self._catch_up(list(active.values()))
        for drafted in range(max((limits[i] for i in active), default=0)):
            self._draft([twin for i, twin in active.items() if limits[i] > drafted])
        return [chain(active[i].ids[lengths[i] :]) if i in active else None for i in range(len(sequences))]

    def release(self, sequence: Sequence) -> None:
        shadow = self._shadows.pop(sequence, None)
        if shadow is not None:
            self._blocks.free(shadow.twin.block_table)

    @property
    def num_used_blocks(self) -> int:
        return self._blocks.num_used

    def _follow(self, sequence: Sequence) -> Sequence:
        """The twin of `sequence` with its tokens; what the twin has computed of other tokens is forgotten."""
        ids = sequence.ids
        shadow = self._shadows.pop(sequence, None)
        if shadow is None:
            request = Request(list(ids))
            shadow = _Shadow(Sequence(request, 0, max_tokens=1, stop_ids=frozenset(), seed=0, text=None, tool=None))
        twin, same = shadow.twin, shadow.known
        while same < min(len(ids), len(twin.ids)) and ids[same] == twin.ids[same]:
            same += 1
        twin.ids[same:] = ids[same:]
        twin.num_computed = min(twin.num_computed, same, len(ids) - 1)  # the newest is what drafting goes on from
        shadow.known = len(ids)
        self._shadows[sequence] = shadow  # now the newest
        return twin

    def _reserve(self, twin: Sequence, limit: int, active: set[Sequence]) -> bool:
        """Take blocks for all known tokens and `limit - 1` drafted ones, from twins that are not active if need be."""
        stop = len(twin.ids) + limit - 1
        changes = BlockChanges()
        while not self._blocks.reserve(twin.block_table, twin.num_computed, stop, changes):
            idle = (s.twin for s in self._shadows.values() if s.twin.block_table and s.twin not in active)
            victim = next(idle, None)
            if victim is None:
                return False
            self._blocks.free(victim.block_table)
            victim.num_computed = 0
        self._runner.cache.apply(changes.copies, changes.fresh)
        return True

    def _catch_up(self, twins: list[Sequence]) -> None:
        """Compute a batch of what the twins lag behind, their newest tokens left out."""
        plan, budget = Schedule(), self.max_batch_tokens
        for twin in twins:
            start = twin.num_computed
            stop = min(len(twin.ids) - 1, start + budget)
            if stop > start:
                plan.chunks.append(Chunk(twin, start, stop))
                budget -= stop - start
        self._run(plan)

    def _draft(self, twins: list[Sequence]) -> None:
        """Add the likeliest next token to each of `twins`."""
        plan = Schedule([Chunk(s, s.num_computed, len(s.ids)) for s in twins])
        hidden, rows = self._run(plan)
        tokens = self._runner.logits(hidden, rows)[:, : self.vocab_size].argmax(-1).tolist()
        for twin, token in zip(twins, tokens, strict=True):
            twin.ids.append(token)

    @torch.no_grad()
    def _run(self, plan: Schedule) -> tuple[torch.Tensor, list[int]]:
        batch = build_batch(plan, block_size=self.block_size, device=self._runner.device)
        hidden = self._runner.run(batch)
        for chunk in plan.chunks:
            chunk.sequence.num_computed = chunk.stop
        return hidden, batch.sample_rows


def check_same_vocabulary(
    draft: tuple[str, Decoder, Tokenizer | None], target: tuple[str, Decoder, Tokenizer | None]
) -> None:
    """UserError naming both (name, model, tokenizer) when ids of the one do not mean the same in the other."""
    draft_name, draft_model, draft_tokenizer = draft
    name, model, tokenizer = target
    if draft_tokenizer is not None and tokenizer is not None:
        if draft_tokenizer.fingerprint == tokenizer.fingerprint:
            return
        ours = f"tokenizer of {tokenizer.vocab_size} tokens, {tokenizer.fingerprint[:8]}"
        theirs = f"tokenizer of {draft_tokenizer.vocab_size} tokens, {draft_tokenizer.fingerprint[:8]}"
    else:
        ours, theirs = (f"{m.config.vocab_size} tokens" for m in (model, draft_model))
        if ours == theirs:
            return
    raise UserError(
        f"the draft model {draft_name} ({theirs}) and {name} ({ours}) have different vocabularies, so the one cannot "
        "draft for the other; take a draft model that was trained with the same tokenizer"
    )
