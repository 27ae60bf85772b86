"""What HTTP costs: `nanoworks serve` under load beside its engine without any of it. On an idle machine:

    python benchmarks/serving/over_http.py [--sizes 120m,1.1b] [--precision int8] [--rounds 3] [--write-docs]
                                           [--rows 64,256,long,start]

Rows: `64 at once` and `256 at once`, so many short requests given together, the output tokens a second until the last
is done: over HTTP, and by an engine in a process of its own on the same prompts, in turns, both started anew in each
round; and how evenly the tokens came over HTTP. `beside 8 long prompts`: the time to the first token of a short prompt
while 8 long ones are read, beside that of an idle server. `start`: from `nanoworks serve` to a /ready that says so.

Server, engine and load generator share the machine's cores, so what HTTP costs includes what its clients cost.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import httpx
import toy_models
from tables import DOCS
from workload import HOME

from nanoworks.serve.bench import Lengths, Load, run_load, summarize
from nanoworks.serve.bench.client import Client
from nanoworks.serve.bench.load import Question, questions
from nanoworks.serve.server import listen

BEGIN, END = "<!-- over_http.py: begin -->", "<!-- over_http.py: end -->"
PROMPT, OUTPUT = 32, 64
"""Tokens of a short request."""
LONG = 1500
"""Tokens of a long prompt."""
START_SECONDS = 120.0
"""Longer than that, a server will not be ready any more."""
STEP_TOKENS = 64
"""--max-batch-tokens of the row beside long prompts: on a CPU a step of 128 takes a while with a large model."""


@dataclass(frozen=True)
class Row:
    size: str
    name: str
    value: float
    goal: str
    held: bool
    detail: str


@dataclass
class Started:
    url: str
    seconds: float
    process: subprocess.Popen[str]


@contextmanager
def server(model: Path, size: str, precision: str, **options: int) -> Iterator[Started]:
    """`nanoworks serve` as a user starts it, ready."""
    with listen("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
    command = [sys.executable, "-m", "nanoworks", "serve", str(model), "--port", str(port), "--name", size]
    command += ["--quantize", "none" if precision == "bf16" else precision]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    log = HOME / "logs" / f"over-http-{size}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, text=True, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        while not _ready(url):
            if process.poll() is not None:
                raise SystemExit(f"the server ended with status {process.returncode}; see {log}")
            if time.perf_counter() - started > START_SECONDS:
                raise SystemExit(f"the server is not ready after {START_SECONDS:.0f} s; see {log}")
            time.sleep(0.05)
        yield Started(url, time.perf_counter() - started, process)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGCONT)
            process.terminate()
            process.wait(60)


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=30).status_code == 200
    except httpx.TransportError:
        return False


class Alone:
    """The engine without HTTP, in a process of its own with the server's settings; asleep except while it works."""

    def __init__(self, model: Path, precision: str, seats: int) -> None:
        command = [sys.executable, __file__, "--worker", str(model), precision, str(seats)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self._read()
        os.killpg(self._process.pid, signal.SIGSTOP)

    def rate(self, prompts: list[str], output: int) -> float:
        """Output tokens a second until the last prompt has `output` tokens."""
        os.killpg(self._process.pid, signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([output, prompts]) + "\n")
        self._process.stdin.flush()
        seconds = float(self._read())
        os.killpg(self._process.pid, signal.SIGSTOP)
        return len(prompts) * output / seconds

    def __enter__(self) -> Alone:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the engine's process ended with status {self._process.wait()}")
        return line


def worker(model: str, precision: str, seats: int) -> None:
    """In the process of `Alone`: a line of prompts in, a line with the seconds out."""
    import nanoworks
    from nanoworks.engine import EngineConfig, SamplingParams

    quantize = None if precision == "bf16" else precision
    config = EngineConfig(max_num_seqs=seats, max_batch_tokens=0, quantize=quantize)
    engine = nanoworks.load(model).engine(config, consume=True)
    assert engine.tokenizer is not None
    print("ready", flush=True)
    for line in sys.stdin:
        output, texts = json.loads(line)
        prompts = [engine.tokenizer.encode(text) for text in texts]
        started = time.perf_counter()
        made = engine.generate(prompts, SamplingParams(max_tokens=output, min_tokens=output, temperature=0.0))
        seconds = time.perf_counter() - started
        assert all(len(c.token_ids) == output for [c] in made)
        print(seconds, flush=True)


def at_once(count: int, size: str, precision: str, rounds: int) -> list[Row]:
    """The rows of `count` short requests given together, each round over HTTP and without."""
    found = [one_round(count, size, precision) for _ in range(rounds)]
    ratio = median(over / without for over, without, _ in found)
    over, without, uneven = (median(column) for column in zip(*found, strict=True))
    told = f"{over:,.0f} against {without:,.0f} tokens/s"
    return [
        Row(size, f"{count} at once: HTTP / engine alone", ratio, "at least 0.95", ratio >= 0.95, told),
        Row(size, f"{count} at once: p99 / median between tokens", uneven, "under 3", uneven < 3, ""),
    ]


def one_round(count: int, size: str, precision: str) -> tuple[float, float, float]:
    """Tokens a second over HTTP and without it, and the p99 of the time between tokens over its median."""
    model = toy_models.model_for("nanoworks", precision, size)
    with server(model, size, precision, max_num_seqs=count) as started, Alone(model, precision, count) as alone:
        for output in (2, OUTPUT):  # the first warms up
            load = Load(
                url=started.url,
                model=size,
                endpoint="completions",
                requests=count,
                concurrency=count,
                prompt_tokens=Lengths.parse(str(PROMPT)),
                output_tokens=Lengths.parse(str(output)),
                temperature=0.0,
                seed=time.time_ns(),
            )
            run = run_load(load, scrape_seconds=5.0)
            summary = summarize(run)
            assert not summary.failed, summary.errors
            assert summary.completion_tokens == count * output
            os.killpg(started.process.pid, signal.SIGSTOP)
            without = alone.rate([question.prompt for question in run.asked], output)
            os.killpg(started.process.pid, signal.SIGCONT)
    assert summary.between_tokens is not None
    middle, _, _, last = summary.between_tokens.percentiles
    return summary.output_tokens_per_second, without, last / middle


def beside_long_prompts(size: str, precision: str, rounds: int) -> list[Row]:
    """The row of a short prompt that comes while 8 long ones are read."""
    model = toy_models.model_for("nanoworks", precision, size)

    async def measure(url: str) -> tuple[float, float]:
        """Seconds to the first token of short prompts: idle, and while long ones are read."""
        kind = {"url": url, "model": size, "endpoint": "completions", "concurrency": 8, "temperature": 0.0}
        short = Load(**kind, prompt_tokens=Lengths.parse(str(PROMPT)), requests=40, seed=time.time_ns())
        long = Load(**kind, prompt_tokens=Lengths.parse(str(LONG)), requests=8, seed=time.time_ns())
        client = Client(short)
        try:
            calibration = await client.calibrate()
            shorts = iter(questions(short, calibration))

            async def first() -> float:
                outcome = await client.ask(Question(next(shorts).prompt, 2))
                assert not outcome.error, outcome.error
                assert outcome.first is not None
                return outcome.first

            idle = [await first() for _ in range(8)]
            under_way = [
                asyncio.create_task(client.ask(Question(question.prompt, 2)))
                for question in questions(long, calibration)
            ]
            await asyncio.sleep(0.05)
            busy = [await first()]
            while len(busy) < 30 and not any(task.done() for task in under_way):
                busy.append(await first())
            for outcome in await asyncio.gather(*under_way):
                assert not outcome.error, outcome.error
        finally:
            await client.close()
        return median(idle), median(busy)

    with server(model, size, precision, max_num_seqs=16, max_batch_tokens=STEP_TOKENS) as started:
        found = [asyncio.run(measure(started.url)) for _ in range(rounds + 1)][1:]
    idle, busy = (median(times[i] for times in found) for i in (0, 1))
    ratio = median(busy / idle for idle, busy in found)
    told = f"{1000 * busy:,.0f} against {1000 * idle:,.0f} ms, --max-batch-tokens {STEP_TOKENS}"
    return [Row(size, "first token beside 8 long prompts / idle", ratio, "under 4", ratio < 4, told)]


def start(size: str, precision: str, rounds: int) -> list[Row]:
    """The row of a server's start."""
    model, seconds = toy_models.model_for("nanoworks", precision, size), []
    for _ in range(rounds):
        with server(model, size, precision) as started:
            seconds.append(started.seconds)
    return [Row(size, "start to /ready, s", median(seconds), "under 10", median(seconds) < 10, "")]


def table(rows: list[Row], precision: str) -> str:
    lines = ["| model | row | measured | goal | |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        value = f"**{row.value:.2f}**" if row.held else f"{row.value:.2f}"
        lines.append(f"| {row.size}, {precision} | {row.name} | {value} | {row.goal} | {row.detail} |")
    return "\n".join(lines)


def write_docs(text: str) -> None:
    """Put `text` between the markers in docs/performance.md."""
    page = DOCS.read_text(encoding="utf-8")
    head, found, rest = page.partition(BEGIN)
    tail = rest.partition(END)[2]
    if not found or not tail:
        raise SystemExit(f"{DOCS} has no lines '{BEGIN}' and '{END}'; put them where the table belongs")
    DOCS.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}", encoding="utf-8")


ROWS = {"64": partial(at_once, 64), "256": partial(at_once, 256), "long": beside_long_prompts, "start": start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--sizes", default="120m,1.1b")
    parser.add_argument("--precision", default="int8", choices=["bf16", "int8", "int4"])
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write-docs", action="store_true")
    options = parser.parse_args()
    if options.worker:
        worker(options.worker[0], options.worker[1], int(options.worker[2]))
        return
    rows = []
    for size in options.sizes.split(","):
        for name in options.rows.split(","):
            found = ROWS[name](size, options.precision, options.rounds)
            print(table(found, options.precision), flush=True)
            rows += found
    if options.write_docs:
        write_docs(table(rows, options.precision))


if __name__ == "__main__":
    main()
