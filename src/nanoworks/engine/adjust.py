"""What changes a row's logits before a token is chosen: penalties, bias, and what may not come now.

Shapes: R rows, V vocabulary, E entries (a row and a token that is changed in it).
"""

from __future__ import annotations

from collections.abc import Sequence as ListOf
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanoworks.engine.guidance import GrammarError, GrammarState
from nanoworks.engine.history import History
from nanoworks.engine.request import SamplingParams
from nanoworks.engine.sequence import Sequence

# What the eight bits of a byte add to the logits of their tokens: 0 where one is set, else -inf. Adding what this table
# holds is three times faster than filling by a mask.
_EIGHT_BITS = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0, -np.inf)
_EIGHT_BITS = _EIGHT_BITS.astype(np.float32)


@dataclass(slots=True)
class Row:
    """One row of logits: those after the known tokens of `sequence` and `drafted`, which are taken as accepted."""

    sequence: Sequence
    drafted: tuple[int, ...] = ()

    @property
    def params(self) -> SamplingParams:
        return self.sequence.request.params

    @property
    def seed(self) -> int:
        return self.sequence.seed

    @property
    def step(self) -> int:
        """Output tokens before the one that is chosen now."""
        return len(self.sequence.completion.token_ids) + len(self.drafted)

    @property
    def remaining(self) -> int:
        """Output tokens that may come, this one included."""
        return self.sequence.max_tokens - self.step

    @property
    def grammar(self) -> GrammarState | None:
        return self.sequence.grammar


def adjust(logits: Tensor, rows: ListOf[Row]) -> tuple[Tensor, dict[int, str]]:
    """Return the logits (R, V) after penalties, bias and masks, a copy if any row asks for one, and what went wrong
    with which row."""
    penal = [i for i, row in enumerate(rows) if _has_penalty(row.params)]
    biased = [i for i, row in enumerate(rows) if row.params.logit_bias]
    early = [i for i, row in enumerate(rows) if _too_early(row)]
    guided = [i for i, row in enumerate(rows) if row.grammar is not None]
    errors: dict[int, str] = {}
    if penal or biased or early or guided:
        logits = logits.clone()
    if penal:
        _penalise(logits, penal, rows)
    if biased:
        entries = [(i, token, bias) for i in biased for token, bias in rows[i].params.logit_bias.items()]
        at, tokens, values = (list(column) for column in zip(*entries, strict=True))
        logits[at, tokens] += torch.tensor(values, dtype=logits.dtype, device=logits.device)
    if early:
        size = logits.size(-1)
        pairs = [(i, token) for i in early for token in rows[i].sequence.stop_ids if token < size]
        logits[[i for i, _ in pairs], [token for _, token in pairs]] = -torch.inf
    if guided:
        errors = _guide(logits, guided, rows)
    return logits, errors


def _too_early(row: Row) -> bool:
    """Whether the output may not end yet; a grammar sees to that itself, for it may know nothing but the end."""
    return row.step < row.params.min_tokens and bool(row.sequence.stop_ids) and row.grammar is None


def _has_penalty(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.frequency_penalty != 0 or params.presence_penalty != 0


def _penalise(logits: Tensor, at: list[int], rows: ListOf[Row]) -> None:
    """Repetition penalty as in Keskar et al. (https://arxiv.org/abs/1909.05858) and transformers: over prompt and
    output, a positive logit is divided, a negative one multiplied. Frequency and presence as OpenAI defines them:
    over the output, logit - count * frequency - (count > 0) * presence."""
    ids, counts = [], []
    for i in at:
        sequence = rows[i].sequence
        if sequence.history is None:
            sequence.history = History(sequence.prompt_length)
        sequence.history.follow(sequence.ids)
        row_ids, row_counts = sequence.history.entries(rows[i].drafted)
        ids.append(row_ids)
        counts.append(row_counts)
    device, size = logits.device, logits.size(-1)
    lengths = [len(row_ids) for row_ids in ids]
    row, token, count = np.repeat(at, lengths), np.concatenate(ids), np.concatenate(counts)
    known = token < size  # a prompt may hold ids that the tokenizer cannot decode

    def entries(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values[known]).to(device)

    def of_params(name: str) -> Tensor:
        return entries(np.repeat(np.array([getattr(rows[i].params, name) for i in at], np.float32), lengths))

    index = entries(row), entries(token)
    values = logits[index]
    repetition = of_params("repetition_penalty")
    values = torch.where(values > 0, values / repetition, values * repetition)
    times = entries(count)
    logits[index] = values - times * of_params("frequency_penalty") - (times > 0) * of_params("presence_penalty")


def _guide(logits: Tensor, at: list[int], rows: ListOf[Row]) -> dict[int, str]:
    """Leave only what the grammars of the rows `at` allow; return what went wrong with which row."""
    errors: dict[int, str] = {}
    size = logits.size(-1)
    masks = np.zeros((len(at), -(-size // 32)), dtype=np.int32)
    for mask, i in zip(masks, at, strict=True):
        grammar = rows[i].grammar
        assert grammar is not None
        try:
            grammar.allow(mask, rows[i].drafted, end=rows[i].step >= rows[i].params.min_tokens)
        except GrammarError as error:
            errors[i] = str(error)
            mask[:] = -1
    bias = np.take(_EIGHT_BITS, masks.view(np.uint8), axis=0).reshape(len(at), -1)[:, :size]
    index = slice(None) if len(at) == len(rows) else torch.tensor(at, device=logits.device)
    logits[index] += torch.from_numpy(bias).to(logits.device)
    return errors
