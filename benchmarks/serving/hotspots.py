"""Where a row's time goes in our engine: `python benchmarks/serving/hotspots.py [120m:int4:decode ...]`.

Without rows, the two that are farthest from their goals in the results there are. Writes one text file a row to
`.bench/results`: operators by their own CPU time (torch.profiler), then Python functions by theirs (cProfile), which
counts what no operator does: scheduling, packing, sampling, the text.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import pstats
import random

import results
import tables
import torch
import toy_models
from adapters.nanoworks import Adapter
from torch.profiler import ProfilerActivity, profile
from workload import HOME, LONG_PROMPT, MIXED, NEW, PROMPT, prompts

ROWS = {
    "prefill": ([LONG_PROMPT], [1]),
    "decode": ([PROMPT], [1 + NEW]),
    "mixed16": ([p for p, _ in MIXED], [n for _, n in MIXED]),
}


def profile_row(size: str, precision: str, row: str, threads: int) -> str:
    adapter = Adapter(str(toy_models.model_for("nanoworks", precision, size)), precision, threads)
    rng = random.Random(0)
    lengths, counts = ROWS[row]
    adapter.generate(prompts(rng, lengths), counts)
    before = adapter.engine.stats().steps
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        adapter.generate(prompts(rng, lengths), counts)
    steps = adapter.engine.stats().steps - before
    python = cProfile.Profile()
    python.runcall(adapter.generate, prompts(rng, lengths), counts)
    text = io.StringIO()
    pstats.Stats(python, stream=text).strip_dirs().sort_stats("tottime").print_stats(25)
    operators = recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60)
    return f"{size} {precision} {row}: {steps} steps, {threads} threads\n\n{operators}\n\n{text.getvalue()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="SIZE:PRECISION:ROW; default: the two worst of the results")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    chosen = [tuple(row.split(":")) for row in options.rows] or tables.worst(results.read())
    torch.set_num_threads(options.threads)
    for size, precision, row in chosen:
        target = HOME / "results" / f"profile-{size}-{precision}-{row}.txt"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(profile_row(size, precision, row, options.threads))
        print(f"wrote {target}")


if __name__ == "__main__":
    main()
