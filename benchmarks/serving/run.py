"""Serving speed of ours and of its peers, side by side: `make bench-serving`.

    python benchmarks/serving/run.py [--sizes 120m,1.1b] [--precisions bf16,int8,int4] [--rows prefill,decode,mixed16]
                                     [--peers vllm,llama.cpp,openvino,transformers] [--rounds 5] [--resume]
    python benchmarks/serving/run.py --report [--write-docs] [--profile]

Peers come from scripts/peers.py. A block is one size in one precision: every engine is loaded into a process of its
own with the same number of threads on the same cores; in each round the engines take turns within each row while the
others are stopped. So whatever else the machine does falls on all, and ratios are taken within a round. Each round
loads all of them anew: where its weights come to lie in memory alone makes the same engine faster or slower by half,
for as long as it runs. Results are kept after every round: a run that was cut goes on with --resume.

Rows: `prefill`, tokens of a 512-token prompt / time to the first token. `decode`, 64 tokens after a 128-token prompt /
the time that 65 tokens take less that of one. `mixed16`, output tokens of 16 requests of mixed lengths given at once /
the time until the last is done, prompts included. Greedy, past any end of text, prompts never seen before.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import bandwidth
import results
import tables
import toy_models
from results import Record
from toy_models import peers
from worker_process import Worker, WorkerError, settle
from workload import ENGINES, LONG_PROMPT, MIXED, NEW, PROMPT, ROWS, SIZES, prompts


def measure(worker: Worker, row: str, rng: random.Random) -> float:
    """Return the rate of one row, in tokens a second."""
    if row == "prefill":
        return LONG_PROMPT / worker.generate(prompts(rng, [LONG_PROMPT]), [1])[0]
    if row == "decode":
        first, _ = worker.generate(prompts(rng, [PROMPT]), [1])
        all_, _ = worker.generate(prompts(rng, [PROMPT]), [1 + NEW])
        return NEW / (all_ - first)
    seconds, _ = worker.generate(prompts(rng, [p for p, _ in MIXED]), [n for _, n in MIXED])
    return sum(n for _, n in MIXED) / seconds


def start(size: str, precision: str, engines: list[str], threads: int) -> dict[str, Worker]:
    """Load the engines that can be; say why the others are left out."""
    workers: dict[str, Worker] = {}
    cpus = sorted(os.sched_getaffinity(0))[:threads]
    for engine in engines:
        ours = engine == "nanoworks"
        if not ours and not peers.installed(engine):
            print(f"  {engine}: SKIPPED, not installed; see python scripts/peers.py {engine}", flush=True)
            continue
        kind = ENGINES[precision][engine]
        started = time.monotonic()
        try:
            model = toy_models.model_for(engine, kind, size)
            python = Path(sys.executable) if ours else peers.python(engine)
            workers[engine] = Worker(engine, kind, model, python=python, threads=threads, cpus=cpus)
            warm_up(workers[engine])
            workers[engine].sleep()
        except (WorkerError, subprocess.CalledProcessError) as error:
            print(f"  {engine}: SKIPPED, {reason(error)}", flush=True)
            if engine in workers:
                workers.pop(engine).close()
        else:
            print(
                f"  {engine} {kind}: ready after {time.monotonic() - started:.0f} s; {workers[engine].about}",
                flush=True,
            )
    return workers


def reason(error: Exception) -> str:
    """What went wrong, in a line: of a traceback the one that names the exception."""
    lines = str(getattr(error, "stderr", None) or error).strip().splitlines() or ["no output"]
    return next((line for line in reversed(lines) if "Error: " in line and not line.startswith(" ")), lines[-1])


def warm_up(worker: Worker) -> None:
    """Run every shape once, short: compilers, allocators and thread pools start here."""
    rng = random.Random(1)
    worker.generate(prompts(rng, [LONG_PROMPT]), [2])
    worker.generate(prompts(rng, [PROMPT]), [4])
    worker.generate(prompts(rng, [p for p, _ in MIXED]), [1 + i % 4 for i in range(len(MIXED))])


def compare_answers(workers: dict[str, Worker]) -> None:
    """Say how often each engine's first token is ours, on 16 short prompts: a wrong conversion shows here.

    The logits of random weights are close together, so a few differ with the rounding, more so below 16 bits.
    """
    asked = prompts(random.Random(2), [24] * 16)
    first = {}
    for engine, worker in workers.items():
        first[engine] = worker.generate(asked, [1] * len(asked))[1]
        worker.sleep()
    ours = first.get("nanoworks")
    for engine, tokens in first.items() if ours else ():
        if engine != "nanoworks":
            same = sum(a == b for a, b in zip(tokens, ours or [], strict=True))
            print(f"  first tokens: {engine} agrees with ours on {same} of {len(asked)}", flush=True)


def block(size: str, precision: str, options: argparse.Namespace) -> None:
    records = results.read()
    engines = [e for e in ENGINES[precision] if e == "nanoworks" or e in options.peers]
    if not options.ours:
        engines.remove("nanoworks")
    print(f"{size} {precision}: {', '.join(engines)}", flush=True)
    todo: dict[str, Record] = {}
    for number in range(options.rounds):
        if todo and all(len(record.rounds) > number for record in todo.values()):
            continue
        workers = start(size, precision, engines, options.threads)
        try:
            if not todo:
                engines = list(workers)  # those that can be had
                compare_answers(workers)
                todo = {row: _record(records, size, precision, row, engines, options) for row in options.rows}
            for record in todo.values():
                if len(record.rounds) <= number:
                    one_round(record, number, workers, options.threads)
                    results.write(records)
        finally:
            for worker in workers.values():
                worker.close()


def _record(
    records: list[Record], size: str, precision: str, row: str, engines: list[str], options: argparse.Namespace
) -> Record:
    """The one to go on with, or a new one among `records`."""
    old = [r for r in records if (r.size, r.precision, r.row, r.engines) == (size, precision, row, engines)]
    if options.resume and old:
        return old[-1]
    records.append(Record(size, precision, row, engines, options.threads))
    return records[-1]


def one_round(record: Record, number: int, workers: dict[str, Worker], threads: int) -> None:
    """Measure every engine once; another one begins in each round."""
    rates: dict[str, float] = {}
    read = bandwidth.read_gbps(threads)
    turn = number % max(1, len(record.engines))
    for engine in record.engines[turn:] + record.engines[:turn]:
        settle()
        rates[engine] = measure(workers[engine], record.row, random.Random(f"{record.row} {number} {time.time_ns()}"))
        workers[engine].sleep()
    record.rounds.append(rates)
    record.bandwidth.append(read)
    shown = "  ".join(f"{engine} {rates[engine]:.1f}" for engine in record.engines)
    print(f"  {number + 1} {record.row:8} {shown}  ({read:.1f} GB/s)", flush=True)


def choices(known: list[str]) -> object:
    def parse(text: str) -> list[str]:
        chosen = [part for part in text.split(",") if part]
        if wrong := [part for part in chosen if part not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(wrong)}: not one of {', '.join(known)}")
        return chosen

    return parse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, known in (
        ("--sizes", list(SIZES)),
        ("--precisions", list(ENGINES)),
        ("--rows", list(ROWS)),
        ("--peers", list(peers.PEERS)),
    ):
        default = [name for name in known if name != "tiny"]
        parser.add_argument(flag, type=choices(known), default=default, help=f"of {','.join(known)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-ours", dest="ours", action="store_false", help="measure peers only")
    parser.add_argument("--resume", action="store_true", help="keep the rounds there are of the same rows and engines")
    parser.add_argument("--report", action="store_true", help="measure nothing, print the tables of what there is")
    parser.add_argument("--profile", action="store_true", help="then profile our two worst rows (hotspots.py)")
    parser.add_argument("--write-docs", action="store_true", help="put the tables into docs/performance.md")
    options = parser.parse_args()
    if not options.report:
        for size in options.sizes:
            for precision in options.precisions:
                block(size, precision, options)
    text = tables.all_tables(results.read())
    print(f"\n{text}")
    if options.write_docs:
        tables.write_docs(tables.all_tables([r for r in results.read() if r.size != "tiny"]))
    if options.profile:
        subprocess.run([sys.executable, str(Path(__file__).with_name("hotspots.py"))], check=True)


if __name__ == "__main__":
    main()
