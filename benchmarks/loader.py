"""How fast the loader makes batches: `python benchmarks/loader.py`.

Two figures for each packing, on the Python standard library with a vocabulary of 4096, in rows of 4 x 512:

- with tokenization: reading, encoding (tiktoken) and packing, all that a training step waits for;
- packing only: the documents were encoded before, so what is left is the loader's own work.

`plain` is the straightforward loader for comparison, in the manner of nanochat's first: one thread, a deque of
tokens, a tensor of Python integers. `cropped` is what best_fit encoded and left out, per token handed out.

CPU seconds count every thread of the process, so tokens per CPU-second hardly depend on the cores, tokens/s
does. All are measured in turn, round after round, and the best round counts. The first batch, which fills the
buffer, is part of the measurement.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch

from nanoworks.data import Loader, Source, build_source
from nanoworks.tokenizer import Tokenizer, train_tokenizer

B, T = 4, 512


class Encoded:
    """Stands in for the tokenizer when documents were encoded beforehand."""

    def __init__(self, tokenizer: Tokenizer, source: Source) -> None:
        self.bos_id = tokenizer.bos_id
        texts = [str(document) for document in source]
        self._ids = dict(zip(texts, tokenizer.encode_batch(texts, bos=True), strict=True))

    def encode_batch(self, texts: Sequence[str], *, bos: bool, threads: int) -> list[list[int]]:
        return [self._ids[text] for text in texts]


def plain(source: Source, tokenizer: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    tokens: deque[int] = deque()
    while True:
        for page in range(len(source)):
            for ids in tokenizer.encode_batch(list(source.read(page)), bos=True, threads=1):
                tokens.extend(ids)
            while len(tokens) > B * T:
                flat = torch.tensor([tokens.popleft() for _ in range(B * T + 1)])
                yield flat[:-1].view(B, T), flat[1:].view(B, T)


def measure(batches: Iterator[Any], count: int) -> tuple[float, float, Any]:
    """Return (tokens per CPU-second, tokens per second, last batch)."""
    wall, cpu = time.perf_counter(), time.process_time()
    [last] = deque(islice(batches, count), maxlen=1)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return count * B * T / cpu, count * B * T / wall, last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=1500, help="batches of 4 x 512 (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions (default: %(default)s)")
    parser.add_argument("--document-chars", type=int, default=1024, help="length of documents (default: %(default)s)")
    options = parser.parse_args()
    source = build_source("stdlib", {"document_chars": options.document_chars})
    tokenizer = train_tokenizer(source, 4096)
    encoders = {"with tokenization": tokenizer, "packing only": Encoded(tokenizer, source)}
    best: dict[tuple[str, str], tuple[float, float, Any]] = {}
    for _ in range(options.rounds):
        for packing in ("plain", "stream", "best_fit"):
            for label, encoder in encoders.items():
                if packing == "plain":
                    figures = measure(plain(source, encoder), options.batches)
                else:
                    with Loader(source, encoder, sequence_length=T, batch_size=B, packing=packing) as loader:
                        figures = measure(iter(loader), options.batches)
                best[packing, label] = max(best.get((packing, label), figures), figures, key=lambda f: f[0])
    print(f"{'':<30}{'tokens/CPU-s':>14}{'tokens/s':>14}{'cropped':>10}")
    for (packing, label), (cpu_speed, speed, batch) in best.items():
        cropped = batch.stats["cropped"] / (options.batches * B * T) if packing == "best_fit" else 0.0
        print(f"{packing:<10}{label:<20}{cpu_speed:>14,.0f}{speed:>14,.0f}{cropped:>10.2f}")


if __name__ == "__main__":
    main()
