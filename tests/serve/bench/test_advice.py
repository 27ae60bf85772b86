"""The load generator's advice: on three servers with a planted bottleneck each, and on numbers for the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nanoworks.cli.main import app
from nanoworks.engine import Engine, EngineConfig
from nanoworks.serve.bench import Advice, advise
from nanoworks.serve.bench.scrape import Snapshot, parse


def advice_of_the_command(serve, make_engine, folder: Path, **config: object) -> tuple[dict[str, Any], str]:
    """What `nanoworks bench serve` writes and prints of a server with such an engine, 16 requests at a time."""
    made = make_engine(context=256)
    engine = Engine(made.model, made.tokenizer, EngineConfig(block_size=16, **config))
    command = [
        "--requests",
        "200",
        "--prompt-tokens",
        "64",
        "--output-tokens",
        "32",
        "--json",
        str(folder / "run.json"),
    ]
    with serve(engine) as url:
        result = CliRunner().invoke(app, ["bench", "serve", url, *command], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    written = json.loads((folder / "run.json").read_text())
    assert written["summary"]["failed"] == 0
    return written["advice"], result.output


def test_too_few_places(serve, make_engine, tmp_path):
    advice, printed = advice_of_the_command(serve, make_engine, tmp_path, max_num_seqs=2, num_blocks=512)
    assert advice["bound"] == "queue", advice
    assert "Queue-bound: all 2 places are taken" in printed
    assert "--max-num-seqs 4" in printed


def test_too_small_a_cache(serve, make_engine, tmp_path):
    # 64 + 32 tokens are six or seven blocks a request: three fit, and there are places for 64.
    advice, printed = advice_of_the_command(serve, make_engine, tmp_path, max_num_seqs=64, num_blocks=20)
    assert advice["bound"] == "kv", advice
    assert "KV-bound" in printed
    assert "--kv-memory" in printed


def test_a_model_that_takes_its_time(serve, make_engine, tmp_path):
    # Places and blocks for all: what remains are the steps.
    advice, printed = advice_of_the_command(serve, make_engine, tmp_path, max_num_seqs=64, num_blocks=512)
    assert advice["bound"] == "compute", advice
    assert "Compute-bound" in printed
    assert "--quantize" in printed


# ------------------------------------------------------------------------------------------------ from numbers


def seen(**values: float) -> Advice:
    """The advice after 100 answers, with `values` in place of those of a server that computes most of the time."""
    grown = {
        "request_success_total": 100.0,
        "request_queue_time_seconds_sum": 1.0,
        "request_prefill_time_seconds_sum": 20.0,
        "request_decode_time_seconds_sum": 79.0,
        "engine_steps_total": 1000.0,
        "engine_tokens_computed_total": 20_000.0,
        "num_preemptions_total": 0.0,
    }
    gauges = {
        "num_requests_running": 8.0,
        "num_requests_waiting": 0.0,
        "kv_cache_usage_perc": 0.3,
        "max_num_seqs": 16.0,
        "max_batch_tokens": 2048.0,
    }
    end = {**grown, **gauges, **values}
    start = {name: 0.0 if name in grown else value for name, value in end.items()}
    return advise([Snapshot(float(i), {**start, **(end if i == 4 else {})}) for i in range(5)])


WAITING = {"request_queue_time_seconds_sum": 150.0, "num_requests_waiting": 12.0}


@pytest.mark.parametrize(
    ("values", "bound", "knob"),
    [
        ({}, "compute", "--quantize"),
        ({"request_prefill_time_seconds_sum": 200.0}, "compute", "prompts that begin alike"),
        ({**WAITING, "num_requests_running": 16.0}, "queue", "--max-num-seqs 32"),
        ({**WAITING, "num_requests_running": 5.0, "kv_cache_usage_perc": 0.97}, "kv", "--kv-memory"),
        # Long prompts: the next one does not fit though a third of the cache is free.
        ({**WAITING, "num_requests_running": 2.0, "kv_cache_usage_perc": 0.6}, "kv", "--kv-memory"),
        # Long prompts again, but here each step is full of them.
        (
            {**WAITING, "num_requests_running": 2.0, "engine_tokens_computed_total": 2_000_000.0},
            "compute",
            "prompts that begin alike",
        ),
        ({"num_preemptions_total": 30.0}, "kv", "--kv-memory"),
        ({"num_requests_running": 0.0}, "none", "a higher --rate"),
        ({"request_success_total": 0.0}, "unknown", "run longer"),
    ],
)
def test_advice_from_numbers(values, bound, knob):
    advice = seen(**values)
    assert advice.bound == bound, advice
    assert advice.knobs[0].startswith(knob)


def test_without_metrics_it_says_so():
    assert advise([]).bound == "unknown"
    assert "/metrics" in advise([]).headline


def test_reads_ours_before_the_alias_and_adds_up_labels():
    text = (
        "# HELP nanoworks:request_success_total Answers.\n"
        'nanoworks:request_success_total{finished_reason="stop",model_name="a} b"} 3.0\n'
        'nanoworks:request_success_total{finished_reason="length",model_name="a} b"} 4.0\n'
        'nanoworks:request_queue_time_seconds_bucket{le="1"} 9.0\n'
        "vllm:request_success_total 100.0\n"
        "process_open_fds 7.0\n"
    )
    assert parse(text, 1.0) == Snapshot(1.0, {"request_success_total": 7.0})
    assert parse(text.replace("nanoworks:", "other:"), 1.0).values == {"request_success_total": 100.0}
    assert parse("", 1.0).values == {}
