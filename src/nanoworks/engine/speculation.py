"""Speculation: guess several tokens, verify them in one step, keep those that are right.

Verification is one rule. The row of the last known token and that of each drafted one are sampled exactly as plain
decoding would sample them, and a drafted token is accepted when it equals the token sampled at its parent. What comes
out is therefore what plain decoding gives: greedily, and with a seed under sampling too. Proposals are deterministic, a
point mass, for which this is the rejection sampling of https://arxiv.org/abs/2211.17192: without a seed the
distribution is kept as well. The exception is `typical`, Medusa's acceptance, which is not exact.

How much to draft is decided by measurement (`draft_length`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from collections.abc import Sequence as ListOf
from dataclasses import dataclass

import torch
from torch import Tensor

from nanoworks.checkpoint import load_checkpoint
from nanoworks.checkpoint.medusa import load_heads
from nanoworks.common.errors import UserError
from nanoworks.engine.config import EngineConfig
from nanoworks.engine.draft_length import DraftLength
from nanoworks.engine.proposers import Proposer
from nanoworks.engine.proposers.draft import DraftModelProposer, check_same_vocabulary
from nanoworks.engine.proposers.medusa import MedusaProposer
from nanoworks.engine.proposers.ngram import NgramProposer
from nanoworks.engine.sequence import Draft, Sequence
from nanoworks.models import Decoder
from nanoworks.tokenizer import Tokenizer


def accept(draft: Draft, sampled_at_root: int, sampled_after: ListOf[int]) -> tuple[list[int], int]:
    """Walk the tree of `draft` along the sampled tokens.

    Args:
        sampled_at_root: the token sampled after the last known one.
        sampled_after: the token sampled after each drafted one.

    Returns:
        Indices of the accepted tokens, from the root on, and the token that was sampled after the last of them, which
        is new too.
    """
    children = {(parent, token): i for i, (token, parent) in enumerate(zip(draft.tokens, draft.parents, strict=True))}
    accepted: list[int] = []
    at, token = -1, sampled_at_root
    while (child := children.get((at, token))) is not None:
        accepted.append(child)
        at, token = child, sampled_after[child]
    return accepted, token


def accept_typical(
    draft: Draft, logits: Tensor, sampled: ListOf[int], *, epsilon: float = 0.09, delta: float = 0.3
) -> tuple[list[int], int]:
    """Medusa's typical acceptance (https://arxiv.org/abs/2401.10774, section 2.3.1): NOT the model's distribution.

    A drafted token is accepted when its probability exceeds min(epsilon, delta * exp(-entropy)) at its parent; of the
    accepted paths the longest is taken, of equal ones the first.

    Args:
        logits: (1 + len(draft), V) of the last known token's row and those of the drafted ones, after penalties,
            temperature and filters: what top_k, top_p or min_p drops is never accepted.
        sampled: the token sampled after each of these rows.

    Returns: as `accept`.
    """
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs.clamp_min(-1e4)).sum(-1)
    threshold = torch.minimum(torch.tensor(math.log(epsilon)), math.log(delta) - entropy).tolist()
    rows = [parent + 1 for parent in draft.parents]
    chosen: list[float] = logprobs[rows, draft.tokens].tolist()
    paths: list[list[int]] = []
    best: list[int] = []
    for i, (parent, logprob, row) in enumerate(zip(draft.parents, chosen, rows, strict=True)):
        reached = parent < 0 or bool(paths[parent])
        paths.append([*(paths[parent] if parent >= 0 else []), i] if reached and logprob > threshold[row] else [])
        if len(paths[i]) > len(best):
            best = paths[i]
    return best, sampled[best[-1] + 1 if best else 0]


@dataclass(slots=True)
class Verified:
    """What a step sampled for one sequence that was one token short."""

    sequence: Sequence
    draft: Draft | None
    """The tokens that went through the model: `Chunk.draft`."""
    sampled: list[int]
    """The token sampled after the last known one, then after each of the draft's."""
    logits: Tensor | None = None
    """Of these rows after penalties, temperature and filters; only where `Speculator.typical`."""


class Speculator:
    """Drafts before a step and says after it what was right. How the engine calls it:

    - Once, before the model's weights are fused or quantized: `Speculator.of(config, model, tokenizer)`; None where
      nothing is drafted.
    - `before(sequences)` ahead of `schedule()`, with the sequences that are one token short: `len(s.ids) - 1 ==
      s.num_computed` and `s.max_tokens > 0`. It sets `sequence.draft`, maybe to None. Where `needs_hidden`, the engine
      has left in `sequence.hidden` the hidden state (C,) of the row whose sampled token became the newest of `s.ids`.
    - `after(verified, known=...)` when the rows are sampled, once a step and also where nothing was drafted: one
      `Verified` for each of those sequences that is in the plan, with the draft as the scheduler cut it. `known` is the
      number of all known tokens in the step, so that a step that also read prompts is not taken for a slow one. It
      returns for each the accepted indices and the token sampled after the last: the engine appends
      `draft.tokens[i]` for these, then that token, in this order and each with the log-probabilities of the row it
      was sampled at (the parent's), until the sequence ends or a tool forces a token; what is left then is dropped.
      `sequence.draft` is None again.
    - `release(sequence)` when it ends. Preemption needs no call.
    """

    def __init__(
        self,
        proposer: Proposer,
        *,
        max_draft: int,
        typical: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.proposer, self.typical = proposer, typical
        self.length = DraftLength(max_draft)
        self.drafted = self.accepted = self.steps = 0
        """Counters since the start: tokens drafted, of them accepted, and drafts that were verified."""
        self._clock = clock
        self._started: float | None = None
        self._pending: list[Sequence] = []

    @classmethod
    def of(cls, config: EngineConfig, model: Decoder, tokenizer: Tokenizer | None) -> Speculator | None:
        """The speculator that `config` asks for.

        Raises:
            UserError: no draft model or heads where some are needed, or those of another model.
        """
        if config.speculate == "none":
            return None
        if config.tensor_parallel > 1 and config.speculate == "medusa":
            raise UserError("speculate=medusa needs the whole model in one process; use ngram or draft instead")
        vocab_size = model.config.vocab_size if tokenizer is None else tokenizer.vocab_size
        return cls(
            _proposer(config, model, tokenizer, vocab_size),
            max_draft=config.max_draft,
            typical=config.typical_acceptance,
        )

    @property
    def needs_hidden(self) -> bool:
        return self.proposer.needs_hidden

    def before(self, sequences: ListOf[Sequence]) -> None:
        """Set the draft of each of `sequences`."""
        self._started = self._clock()
        for sequence in self._pending:  # one that was not in the plan after all, or was preempted
            sequence.draft = None
        self._pending = list(sequences)
        limits = self.length.limits(sequences)
        # The token sampled after the last accepted one is new too, and room for it is all that is needed.
        room = [s.max_tokens - len(s.completion.token_ids) - 1 for s in sequences]
        limits = [max(0, min(limit, left)) for limit, left in zip(limits, room, strict=True)]
        drafts = self.proposer.propose(sequences, limits) if any(limits) else [None] * len(sequences)
        for sequence, draft in zip(sequences, drafts, strict=True):
            sequence.draft = draft

    def after(self, verified: ListOf[Verified], *, known: int) -> list[tuple[list[int], int]]:
        """Return the accepted indices and the final token of each; see the class."""
        outcomes: list[tuple[list[int], int]] = []
        drafted = 0
        for v in verified:
            v.sequence.draft = None
            if v.draft is None or not v.draft.tokens:
                outcomes.append(([], v.sampled[0]))
                continue
            if self.typical:
                assert v.logits is not None, "typical acceptance needs the logits"
                outcome = accept_typical(v.draft, v.logits, v.sampled)
            else:
                outcome = accept(v.draft, v.sampled[0], v.sampled[1:])
            outcomes.append(outcome)
            drafted += len(v.draft.tokens)
            self.accepted += len(outcome[0])
            self.steps += 1
            self.length.verified(v.sequence, len(v.draft.tokens), outcome[0])
        self.drafted += drafted
        if self._started is not None and known == len(verified) > 0:
            self.length.took(len(verified), drafted, self._clock() - self._started)
        self._started = None
        return outcomes

    def release(self, sequence: Sequence) -> None:
        self.proposer.release(sequence)
        self.length.release(sequence)


def _proposer(config: EngineConfig, model: Decoder, tokenizer: Tokenizer | None, vocab_size: int) -> Proposer:
    if config.speculate == "ngram":
        return NgramProposer()
    if config.draft_model is None:
        what = "a draft model" if config.speculate == "draft" else "a run of the stage medusa"
        raise UserError(f"speculate={config.speculate} needs {what}: give it as draft_model")
    if config.speculate == "medusa":
        saved = load_heads(config.draft_model, model)
        return MedusaProposer(saved, model, size=config.max_draft, vocab_size=vocab_size)
    weight = model.embed_tokens.weight
    loaded = load_checkpoint(config.draft_model, device=weight.device, dtype=weight.dtype, mapped=True)
    check_same_vocabulary((config.draft_model, loaded.model, loaded.tokenizer), ("the model", model, tokenizer))
    return DraftModelProposer(
        loaded.model,
        vocab_size=min(vocab_size, loaded.model.config.vocab_size),
        max_num_seqs=config.max_num_seqs,
        max_batch_tokens=config.max_batch_tokens,
        block_size=config.block_size,
    )
