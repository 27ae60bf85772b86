"""Measured rounds on disk: `.bench/results/serving.json`, a list of records, written after every round."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from statistics import median

from workload import HOME

FILE = HOME / "results" / "serving.json"


@dataclass
class Record:
    """One row measured in one block: each round has the rate (tokens/s) of every engine, one after the other."""

    size: str
    precision: str
    row: str
    engines: list[str]
    threads: int
    rounds: list[dict[str, float]] = field(default_factory=list)
    bandwidth: list[float] = field(default_factory=list)
    """GB/s read in each round."""
    time: float = field(default_factory=time.time)

    def rate(self, engine: str) -> float:
        return median(r[engine] for r in self.rounds)

    def ratio(self, peer: str) -> float:
        """Median over the rounds of ours / `peer`: what else the machine did in a round, it did to both."""
        return median(r["nanoworks"] / r[peer] for r in self.rounds)

    @property
    def peers(self) -> list[str]:
        return [engine for engine in self.engines if engine != "nanoworks"]


def read() -> list[Record]:
    return [Record(**r) for r in json.loads(FILE.read_text())] if FILE.exists() else []


def write(records: list[Record]) -> None:
    FILE.parent.mkdir(parents=True, exist_ok=True)
    scratch = FILE.with_suffix(".part")
    scratch.write_text(json.dumps([asdict(r) for r in records], indent=1))
    scratch.rename(FILE)


def newest(records: list[Record], size: str, precision: str, row: str, peer: str | None = None) -> Record | None:
    """The last record of a row that has rounds of ours and of `peer`."""
    for record in reversed(records):
        if (record.size, record.precision, record.row) != (size, precision, row) or not record.rounds:
            continue
        if "nanoworks" in record.engines and (peer is None or peer in record.engines):
            return record
    return None
