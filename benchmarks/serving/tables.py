"""The tables that the results make, as Markdown, and the place of them in docs/performance.md."""

from __future__ import annotations

from statistics import median

import results
from results import Record
from workload import ENGINES, ROOT, ROWS, SIZES, weights

DOCS = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- make bench-serving: begin -->", "<!-- make bench-serving: end -->"

NAMES = {"decode": "decode, batch 1", "mixed16": "16 mixed requests", "prefill": "prefill"}

# (row, precision, peer or None for the best of them, goal): what the project wants to reach.
GOALS: list[tuple[str, str, str | None, float | None]] = [
    ("decode", "bf16", None, 1.1),
    ("decode", "int8", None, 1.15),
    ("decode", "int4", None, 1.0),
    ("mixed16", "bf16", None, 1.1),
    ("mixed16", "int8", None, 1.1),
    ("mixed16", "int4", None, None),
    ("prefill", "bf16", None, 1.1),
    ("prefill", "int8", None, 1.1),
    ("prefill", "int4", None, None),
    ("mixed16", "bf16", "transformers", 4.0),
]

BYTES = {"bf16": 2.0, "int8": 1.0, "int4": 0.5}
"""Of a weight; scales and zero points are left out."""


def best_peer(record: Record) -> str | None:
    return max(record.peers, key=record.rate, default=None)


def against(records: list[Record], size: str, row: str, precision: str, peer: str | None) -> tuple[Record, str] | None:
    """The record to judge a goal by, and the peer in it."""
    record = results.newest(records, size, precision, row, peer)
    name = peer or (None if record is None else best_peer(record))
    return None if record is None or name is None else (record, name)


def goals(records: list[Record]) -> str:
    lines = ["| size | row | ours, tok/s | best peer | its tok/s | ratio | rounds | goal |", "| --- |" + " --- |" * 7]
    for size in SIZES:
        for row, precision, peer, goal in GOALS:
            found = against(records, size, row, precision, peer)
            if found is None:
                continue
            record, name = found
            ratio = record.ratio(name)
            shown = f"**{ratio:.2f}**" if goal is None or ratio >= goal else f"{ratio:.2f}"
            target = "-" if goal is None else f"{goal:g}"
            lines.append(
                f"| {size} | {NAMES[row]}, {precision} | {record.rate('nanoworks'):,.0f} | {name} | "
                f"{record.rate(name):,.0f} | {shown} | {len(record.rounds)} | {target} |"
            )
    return "\n".join(lines)


def everyone(records: list[Record]) -> str:
    """Each engine's median rate in every row."""
    lines = ["| size | precision | engine | " + " | ".join(NAMES[row] for row in ROWS) + " |", "| --- |" + " --- |" * 5]
    for size in SIZES:
        for precision, engines in ENGINES.items():
            for engine in engines:
                peer = None if engine == "nanoworks" else engine
                cells = []
                for row in ROWS:
                    record = results.newest(records, size, precision, row, peer)
                    cells.append("-" if record is None else f"{record.rate(engine):,.0f}")
                if set(cells) != {"-"}:
                    lines.append(f"| {size} | {precision} | {engine} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def bandwidth(records: list[Record]) -> str:
    """Share of the memory bandwidth that decoding one sequence uses for weights, by round."""
    lines = ["| size | precision | measured, GB/s | ours | share | best peer | share |", "| --- |" + " --- |" * 6]
    for size in SIZES:
        for precision in ENGINES:
            record = results.newest(records, size, precision, "decode")
            if record is None:
                continue
            gigabytes = weights(size) * BYTES[precision] / 1e9

            def share(engine: str, record: Record = record, gigabytes: float = gigabytes) -> str:
                rounds = zip(record.rounds, record.bandwidth, strict=True)
                return f"{100 * median(r[engine] * gigabytes / b for r, b in rounds):.0f}%"

            peer = best_peer(record)
            lines.append(
                f"| {size} | {precision} | {median(record.bandwidth):.1f} | {record.rate('nanoworks'):,.0f} tok/s | "
                f"{share('nanoworks')} | {peer or '-'} | {share(peer) if peer else '-'} |"
            )
    return "\n".join(lines)


def worst(records: list[Record], count: int = 2) -> list[tuple[str, str, str]]:
    """(size, precision, row) of the rows that are farthest from their goals."""
    found = []
    for size in SIZES:
        for row, precision, peer, goal in GOALS:
            pair = against(records, size, row, precision, peer)
            if pair is not None and goal is not None:
                found.append((pair[0].ratio(pair[1]) / goal, (size, precision, row)))
    return list(dict.fromkeys(key for _, key in sorted(found)))[:count]


def all_tables(records: list[Record]) -> str:
    return "\n\n".join([goals(records), bandwidth(records), everyone(records)])


def write_docs(text: str) -> None:
    """Put `text` between the markers in docs/performance.md."""
    page = DOCS.read_text(encoding="utf-8")
    head, found, rest = page.partition(BEGIN)
    tail = rest.partition(END)[2]
    if not found or not tail:
        raise SystemExit(f"{DOCS} has no lines '{BEGIN}' and '{END}'; put them where the tables belong")
    DOCS.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}", encoding="utf-8")
