"""The loader: a mixture of sources in, batches for the trainer out, with an exact position beside each.

    loader = Loader(Mixture([stdlib, world], [0.7, 0.3]), tokenizer, sequence_length=512, batch_size=4)
    for batch in loader: ...

Reading, encoding and packing run in a background thread, a few batches ahead of the trainer.

**The position.** A batch carries the state that follows it: the position of each source, and the addresses
(not the tokens) of the documents that were read but are not used up: those in the packer's buffer and those
encoded ahead. To resume is to read these documents again and go on; as every step is deterministic, the next
batch is the same to the bit. The state is a few kilobytes of JSON, whatever the size of the documents. It does
not hang on the batch size, the row length or the packing; these may change in between.

On another number of ranks (or from another rank's state) the buffered documents are left out and reading goes
on at the next pages that nobody had begun: a small part of the data is skipped, next to nothing is repeated.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from nanoworks.common.errors import UserError, nearest
from nanoworks.data.background import background
from nanoworks.data.encoding import EncodedReader, EncodingOptions
from nanoworks.data.mixture import Mixture, MixtureReader
from nanoworks.data.packing import PACKERS, Packed
from nanoworks.data.source import Source
from nanoworks.tokenizer import Tokenizer


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens, on the CPU."""

    tokens: Tensor
    """(B, T) int64."""
    targets: Tensor
    """(B, T) int64, the token after each of `tokens`."""
    weights: Tensor
    """(B, T) float32, 0 where the target is not supervised."""
    documents: Tensor | None
    """(B, T) int32, which document of its row a token belongs to; None when attention need not know."""
    state: dict[str, Any]
    """JSON-able position of the loader after this batch."""
    num_supervised: int
    """Positions with a weight."""
    stats: dict[str, float]
    """`padding`: share of this batch. Since the start of the run: `epoch` (whole passes of the sources read, the
    buffer included), documents `truncated` and `dropped` (conversations longer than a row), `skipped` (not
    readable), and tokens `cropped` by packing."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """Return the batch with its tensors on `device`."""
        moved = {
            name: value.to(device, non_blocking=non_blocking)
            for name in ("tokens", "targets", "weights", "documents")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **moved)


class Loader:
    """Iterate it for batches; each `iter()` begins anew, at `state` or at the beginning. One at a time."""

    def __init__(
        self,
        mixture: Mixture | Source,
        tokenizer: Tokenizer,
        *,
        sequence_length: int,
        batch_size: int,
        packing: str = "best_fit",
        overlong: Literal["truncate", "drop"] = "truncate",
        loss_on: Literal["all", "assistant"] = "assistant",
        documents: bool = True,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        infinite: bool = True,
        buffer: int = 1000,
        threads: int = 1,
        prefetch: int = 8,
        pin_memory: bool = False,
        state: dict[str, Any] | None = None,
    ) -> None:
        """`batch_size` is the rows of this rank's micro-batch.

        `overlong`: what becomes of a conversation longer than a row (but for `stream`, which cuts anywhere).
        `loss_on`: which tokens of a conversation are supervised; of a text always all.
        `documents`: whether batches tell their documents apart.
        `infinite`: epoch after epoch; False: every document once, as validation needs.
        `buffer`: documents that best_fit chooses from. `threads`: of the tokenizer. `prefetch`: batches
        prepared ahead by a background thread; 0: none, and no thread. `pin_memory`: for copies to a GPU.
        `state`: of the batch after which to go on.

        Raises:
            UserError: a setting is out of range, or the state belongs to other sources or to another seed.
        """
        if packing not in PACKERS:
            known = ", ".join(PACKERS)
            raise UserError(f"unknown packing {packing!r}{nearest(packing, PACKERS)}; known: {known}")
        sizes = {"sequence_length": sequence_length, "batch_size": batch_size, "buffer": buffer}
        for name, value in sizes.items():
            if value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        if not 0 <= rank < world_size:
            raise UserError(f"rank {rank} is outside a world of {world_size}")
        self.mixture = Mixture([mixture]) if isinstance(mixture, Source) else mixture
        self._tokenizer, self._packing, self._buffer = tokenizer, packing, buffer
        self._sequence_length, self._batch_size = sequence_length, batch_size
        self._encoding = EncodingOptions(
            longest=None if packing == "stream" else sequence_length + 1,
            overlong=overlong,
            loss_on=loss_on,
            threads=threads,
        )
        self._documents, self._pin_memory, self._prefetch = documents, pin_memory, prefetch
        self._rank, self._world_size, self._seed, self._infinite = rank, world_size, seed, infinite
        self._state = state
        if state is not None:
            self._check(state)
        # Weak, so that an iterator that its consumer lets go of ends its thread.
        self._running: weakref.ref[Generator[Batch, None, None]] | None = None

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        batches = self._batches()
        running = background(batches, self._prefetch) if self._prefetch else batches
        self._running = weakref.ref(running)
        return running

    def close(self) -> None:
        """Stop reading: end the background thread and close the files."""
        if self._running is not None and (running := self._running()) is not None:
            running.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, state: dict[str, Any]) -> None:
        change = "restore it in the recipe, or start a new run from the checkpoint with init_from"
        names = self._source_names()
        if state["sources"] != names:
            raise UserError(
                f"the saved position in the data is of the sources {state['sources']}, not {names}; {change}"
            )
        if state["seed"] != self._seed:
            raise UserError(
                f"the saved position in the data is of seed {state['seed']}, not {self._seed}, and the order of "
                f"the data follows the seed; {change}"
            )

    def _batches(self) -> Generator[Batch, None, None]:
        reader = MixtureReader(
            self.mixture,
            rank=self._rank,
            world_size=self._world_size,
            seed=self._seed,
            epochs=None if self._infinite else 1,
        )
        documents = EncodedReader(self.mixture, reader, self._tokenizer, self._encoding)
        packer = PACKERS[self._packing](
            batch_size=self._batch_size,
            sequence_length=self._sequence_length,
            pad_id=self._tokenizer.bos_id,
            buffer=self._buffer,
        )
        if (state := self._state) is not None:
            reader.load_state(state["reader"])
            documents.truncated, documents.dropped = state["truncated"], state["dropped"]
            packer.cropped = state["cropped"]
            if (state["rank"], state["world_size"]) == (self._rank, self._world_size):
                documents.restore(state["held"])
                packer.skip = state["skip"]
        while (packed := packer.pack(documents)) is not None:
            counts = {
                "truncated": documents.truncated,
                "dropped": documents.dropped,
                "cropped": packer.cropped,
            }
            position = {
                "sources": self._source_names(),
                "seed": self._seed,
                "rank": self._rank,
                "world_size": self._world_size,
                "reader": reader.state(),
                "held": packer.held() + documents.held(),
                "skip": packer.skip,
            }
            stats = {
                "padding": packed.padding / packed.tokens.size,
                "epoch": reader.epoch,
                "skipped": reader.skipped,
            }
            yield self._batch(packed, {**position, **counts}, {**stats, **counts})

    def _batch(self, packed: Packed, state: dict[str, Any], stats: dict[str, float]) -> Batch:
        tokens, targets, weights, documents = map(torch.from_numpy, packed[:4])
        if self._pin_memory:
            tokens, targets, weights, documents = (t.pin_memory() for t in (tokens, targets, weights, documents))
        return Batch(
            tokens,
            targets,
            weights,
            documents if self._documents else None,
            state,
            num_supervised=int(np.count_nonzero(packed.weights)),
            stats=stats,
        )

    def _source_names(self) -> list[str]:
        return [type(source).__name__ for source in self.mixture.sources]
