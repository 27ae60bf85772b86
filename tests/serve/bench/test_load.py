"""The load generator: what it asks, what it measures, what it writes."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from nanoworks.cli.main import app
from nanoworks.common.errors import UserError
from nanoworks.serve.bench import Lengths, Load, run_load, summarize
from nanoworks.serve.bench.client import Client, server_url
from nanoworks.serve.bench.load import Calibration, Question, questions
from nanoworks.serve.bench.summary import PERCENTILES, Spread


def load(url: str, **fields: object) -> Load:
    made = {
        "requests": 12,
        "concurrency": 4,
        "prompt_tokens": Lengths.parse("48"),
        "output_tokens": Lengths.parse("8"),
    }
    return Load(url=url, model="tiny", **{**made, **fields})


@pytest.fixture(scope="module")
def url(serve, make_engine) -> Iterator[str]:
    with serve(make_engine(context=256)) as url:
        yield url


# --------------------------------------------------------------------------------------------------- what it asks


def test_lengths():
    rng = random.Random(0)
    assert {Lengths.parse("7").draw(rng) for _ in range(10)} == {7}
    assert {Lengths.parse("3-5").draw(rng) for _ in range(100)} == {3, 4, 5}
    drawn = [Lengths.parse("100~0.5").draw(rng) for _ in range(4000)]
    assert np.median(drawn) == pytest.approx(100, rel=0.1)
    assert np.log(drawn).std() == pytest.approx(0.5, rel=0.1)
    assert min(drawn) >= 1
    assert max(drawn) <= 1600


@pytest.mark.parametrize("text", ["", "x", "0", "5-3", "0-4", "10~", "10~-1", "1-2-3"])
def test_refuses_what_is_no_length(text):
    with pytest.raises(UserError, match=r"write|begin"):
        Lengths.parse(text)


def test_poisson_arrivals():
    asked = questions(load("http://x", requests=4000, concurrency=None, rate=50.0), Calibration(0, 1))
    gaps = np.diff([0.0, *(question.at for question in asked)])
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.1)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.1)  # of an exponential the same as its mean


def test_a_seed_repeats_and_no_two_prompts_begin_alike():
    first, again = (questions(load("http://x", requests=200, seed=1), Calibration(0, 1)) for _ in range(2))
    other = questions(load("http://x", requests=200, seed=2), Calibration(0, 1))
    assert first == again
    beginnings = {question.prompt[:32] for question in first + other}
    assert len(beginnings) == 400


def test_needs_a_rate_or_a_concurrency():
    for fields in ({"concurrency": None}, {"rate": 1.0}):
        with pytest.raises(UserError, match="either"):
            load("http://x", **fields)


def test_server_url():
    assert server_url("http://a:1/v1/") == server_url("http://a:1") == "http://a:1"
    with pytest.raises(UserError, match="http://"):
        server_url("a:1")


# ----------------------------------------------------------------------------------------------- what it measures


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_asks_for_the_lengths_it_was_told(url, endpoint):
    run = run_load(load(url, endpoint=endpoint, output_tokens=Lengths.parse("5-9")))
    summary = summarize(run)
    assert (summary.answered, summary.failed) == (12, 0), summary.errors
    assert {outcome.completion_tokens for outcome in run.outcomes} <= set(range(5, 10))
    for outcome in run.outcomes:
        assert outcome.prompt_tokens == pytest.approx(48, abs=5)  # a word has five bytes, and so many tokens
    assert summary.output_tokens_per_second == pytest.approx(summary.completion_tokens / run.seconds)


def test_keeps_so_many_under_way(serve, make_engine):
    with serve(make_engine(context=256)) as url:
        run = run_load(load(url, requests=40, concurrency=5), scrape_seconds=0.02)
    assert most_at_once(run.outcomes) == 5
    assert len(run.snapshots) >= 2
    assert run.snapshots[-1].get("request_success_total") - run.snapshots[0].get("request_success_total") == 40


def test_sends_by_the_clock_however_slow_the_server_is(serve, make_engine):
    with serve(make_engine(context=256)) as url:
        asked = load(url, requests=30, concurrency=None, rate=200.0, output_tokens=Lengths.parse("64"))
        run = run_load(asked)
    planned = [question.at for question in questions(asked, Calibration(0, 1))]
    late = [outcome.started - run.started - at for outcome, at in zip(run.outcomes, planned, strict=True)]
    assert min(late) > -0.01  # never before its time
    assert summarize(run).answered == 30


def most_at_once(outcomes) -> int:
    moments = sorted(
        [(o.started, 1) for o in outcomes] + [(o.ended, -1) for o in outcomes], key=lambda m: (m[0], -m[1])
    )
    return int(np.cumsum([change for _, change in moments]).max())


class Scripted(BaseHTTPRequestHandler):
    """An endpoint whose answers are known: a role, three pieces 50 ms apart, usage; every fourth request fails."""

    count = 0

    def do_POST(self) -> None:
        type(self).count += 1
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["stream"] is True
        if type(self).count % 4 == 0:
            error = json.dumps({"error": {"message": "too many"}}).encode()
            self.send_response(429)
            self.send_header("Content-Length", str(len(error)))
            self.end_headers()
            self.wfile.write(error)
            return
        self.send_response(200)
        self.end_headers()
        self._event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for piece in "abc":
            time.sleep(0.05)
            self._event({"choices": [{"delta": {"content": piece}}]})
        self._event({"choices": [{"delta": {}, "finish_reason": "length"}]})
        usage = {"prompt_tokens": 10 + len(body["messages"][0]["content"].split()), "completion_tokens": 3}
        self._event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, chunk: object) -> None:
        self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def scripted() -> Iterator[str]:
    Scripted.count = 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Scripted) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_measures_from_the_outside(scripted):
    run = run_load(load(scripted, requests=8, concurrency=1))
    summary = summarize(run)
    assert (summary.answered, summary.failed) == (6, 2)
    assert summary.errors == {"429: too many": 2}
    assert summary.completion_tokens == 18
    assert {o.prompt_tokens for o in run.outcomes if not o.error} == {48}  # 10 and a word a token
    assert len(run.snapshots) == 0  # it has no /metrics
    first, between, whole = summary.first_token, summary.between_tokens, summary.whole
    assert first is not None
    assert between is not None
    assert whole is not None
    # The role is no token, so the first comes after 50 ms; sleeping takes longer, never shorter.
    assert first.percentiles[0] >= 0.05
    assert between.mean >= 0.045
    assert whole.mean >= first.mean + 2 * 0.05
    assert whole.mean == pytest.approx(first.mean + 2 * between.mean, abs=0.04)
    for outcome in run.outcomes:
        assert len(outcome.gaps) == (0 if outcome.error else 2)


@pytest.mark.parametrize(
    "sent", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\ndata: {", b"no HTTP at all\r\n\r\n"]
)
def test_a_server_that_hangs_up_is_a_failure_and_no_hang(sent):
    async def run() -> str:
        async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(sent)
            writer.close()

        async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
            host, port = server.sockets[0].getsockname()
            client = Client(load(f"http://{host}:{port}"))
            outcome = await asyncio.wait_for(client.ask(Question("hello", 1)), 30)
            await client.close()
        return outcome.error

    assert "Error" in asyncio.run(run())


def test_a_connection_that_the_server_closed_meanwhile_is_replaced(scripted):
    # The scripted server ends each connection with its answer, as HTTP/1.0 does.
    run = run_load(load(scripted, requests=3, concurrency=1))
    assert [outcome.error for outcome in run.outcomes if "Error" in outcome.error] == []


def test_gives_up_on_an_answer_that_never_comes():
    async def run() -> str:
        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
            host, port = server.sockets[0].getsockname()
            client = Client(load(f"http://{host}:{port}", timeout=0.1))
            return (await client.ask(Question("hello", 1))).error

    assert asyncio.run(run()) == "no whole answer within 0.1 s"


def test_percentiles():
    spread = Spread.of(range(101))
    assert spread is not None
    assert spread.percentiles == PERCENTILES
    assert (spread.mean, spread.max) == (50, 100)
    assert Spread.of([]) is None


# ------------------------------------------------------------------------------------------------ the command line


def test_the_command_prints_writes_and_draws(url, tmp_path: Path):
    out, picture = tmp_path / "load.json", tmp_path / "load.png"
    command = ["bench", "serve", f"{url}/v1", "--requests", "10", "--concurrency", "2", "--prompt-tokens", "30-60"]
    command += ["--output-tokens", "6", "--seed", "3", "--json", str(out), "--plot", str(picture)]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    for line in ("tiny at", "10 requests, 2 at a time", "time to first token", "between tokens", "p99", "Try:"):
        assert line in result.output
    written = json.loads(out.read_text())
    assert written["load"]["seed"] == 3
    assert len(written["requests"]) == 10
    assert written["summary"]["completion_tokens"] == sum(r["completion_tokens"] for r in written["requests"]) == 60
    assert written["advice"]["bound"] in {"queue", "kv", "compute", "none", "unknown"}
    assert len(written["metrics"]) >= 2
    with Image.open(picture) as image:
        assert image.size == (1320, 840)
        assert len(set(np.asarray(image.convert("L")).ravel())) > 50  # not an empty sheet


def test_the_key_is_sent_and_never_written(url, tmp_path: Path):
    out = tmp_path / "load.json"
    command = ["bench", "serve", url, "--requests", "2", "--output-tokens", "2", "--prompt-tokens", "40"]
    result = CliRunner().invoke(app, [*command, "--json", str(out)], env={"NANOWORKS_API_KEY": "sk-secret"})
    assert result.exit_code == 0, result.output
    assert "sk-secret" not in result.output + out.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["http://127.0.0.1:1"], "nanoworks serve CHECKPOINT"),
        (["nonsense"], "http://"),
        (["--prompt-tokens", "many"], "128, 64-256"),
        (["--rate", "1", "--concurrency", "2"], "either"),
        (["--json", "/no/such/folder/x.json"], "there is no folder"),
    ],
)
def test_mistakes_are_told_with_their_fix(url, arguments, words):
    where = [] if arguments[0].startswith(("http", "nonsense")) else [url]
    result = CliRunner().invoke(app, ["bench", "serve", *where, *arguments])
    assert isinstance(result.exception, UserError)
    assert words in str(result.exception)


def test_a_prompt_that_never_fits_is_an_error_with_the_servers_words(url):
    result = CliRunner().invoke(app, ["bench", "serve", url, "--requests", "2", "--prompt-tokens", "2000"])
    assert isinstance(result.exception, UserError)
    assert "no request was answered" in str(result.exception)
    assert "400" in result.output
