"""/metrics tells the truth: the numbers of requests whose every token is known, under both prefixes."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from nanoworks.engine import Delta, EngineConfig, SamplingParams
from nanoworks.serve.errors import ApiError
from nanoworks.serve.metrics import Metrics

# The names that dashboards and alert rules rely on, as Prometheus has them.
COUNTERS = {
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
    "num_preemptions_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "spec_decode_num_draft_tokens_total",
    "spec_decode_num_accepted_tokens_total",
    "engine_restarts_total",
    "engine_steps_total",
    "engine_tokens_computed_total",
    "http_requests_total",
}
GAUGES = {
    "engine_up",
    "max_num_seqs",
    "max_batch_tokens",
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "kv_cache_waste_perc",
    "spec_decode_draft_acceptance_rate",
}
HISTOGRAMS = {
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_inference_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_params_max_tokens",
    "request_params_n",
}

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(url: str) -> Series:
    """Every series of /metrics, by its name and its labels without the model's name."""
    answer = httpx.get(f"{url}/metrics").raise_for_status()
    series: Series = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = dict(sample.labels)
            if not sample.name.startswith("process_"):
                assert labels.pop("model_name") == "tiny", sample
            series[sample.name, tuple(sorted(labels.items()))] = sample.value
    return series


def value(series: Series, name: str, **labels: str) -> float:
    return series[f"nanoworks:{name}", tuple(sorted(labels.items()))]


def chat(url: str, **body: object) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "hello " * 10}], "temperature": 0, **body}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)


@pytest.fixture(scope="module")
def url(serve, make_engine) -> Iterator[str]:
    with serve(make_engine(context=256)) as url:
        yield url


def test_has_every_name_under_both_prefixes(url):
    chat(url, max_tokens=3)
    text = httpx.get(f"{url}/metrics").text
    names = {name for name, _ in scrape(url)}
    for prefix in ("nanoworks:", "vllm:"):
        for name in COUNTERS | GAUGES:
            assert prefix + name in names
        for name in HISTOGRAMS:
            assert {f"{prefix}{name}_{part}" for part in ("bucket", "sum", "count")} <= names
        assert f"# TYPE {prefix}num_requests_running gauge\n" in text
        assert f"# TYPE {prefix}prompt_tokens_total counter\n" in text
    assert not [name for name in names if name.endswith("_created")]
    assert "process_resident_memory_bytes" in names


def test_the_documentation_lists_them(url):
    page = (Path(__file__).parents[2] / "docs" / "monitoring.md").read_text()
    for kind, names in (("counter", COUNTERS), ("gauge", GAUGES), ("histogram", HISTOGRAMS)):
        assert set(re.findall(rf"^\| `(\w+)` \| {kind} \|", page, flags=re.MULTILINE)) == names
    there = {name.removeprefix("nanoworks:") for name, _ in scrape(url) if name.startswith("nanoworks:")}
    parts = {f"{name}_{part}" for name in HISTOGRAMS for part in ("bucket", "sum", "count")}
    assert there == COUNTERS | GAUGES | parts


def test_the_alias_has_the_same_values(url):
    chat(url, max_tokens=3)
    series = scrape(url)
    ours = {key: value for key, value in series.items() if key[0].startswith("nanoworks:")}
    assert len(ours) > 100
    for (name, labels), value in ours.items():
        assert series[name.replace("nanoworks:", "vllm:"), labels] == value


def test_counts_requests_and_tokens(serve, make_engine):
    with serve(make_engine(context=256)) as url:
        answers = [chat(url, max_tokens=7, min_tokens=7, n=n).json() for n in (1, 2)]
        streamed = chat(url, max_tokens=5, min_tokens=5, stream=True)
        assert streamed.status_code == 200
        series = scrape(url)
    prompt = answers[0]["usage"]["prompt_tokens"]
    assert value(series, "prompt_tokens_total") == 3 * prompt
    assert value(series, "generation_tokens_total") == 7 + 14 + 5
    assert value(series, "request_success_total", finished_reason="length") == 1 + 2 + 1
    assert value(series, "request_success_total", finished_reason="error") == 0
    assert value(series, "time_to_first_token_seconds_count") == 3
    assert value(series, "request_queue_time_seconds_count") == 3
    assert value(series, "e2e_request_latency_seconds_count") == 3
    assert value(series, "inter_token_latency_seconds_count") == 6 + 12 + 4  # the first of each answer has none
    assert value(series, "request_prompt_tokens_sum") == 3 * prompt
    assert value(series, "request_generation_tokens_sum") == 26
    assert value(series, "request_params_n_sum") == 4
    assert value(series, "num_requests_running") == value(series, "num_requests_waiting") == 0
    assert value(series, "engine_up") == 1
    assert value(series, "engine_steps_total") >= 7 + 7 + 5
    # The second and third prompts were found in the cache, whole blocks of them.
    assert 0 < value(series, "prefix_cache_hits_total") <= value(series, "prefix_cache_queries_total") <= 3 * prompt


def test_parts_of_a_request_add_up(serve, make_engine):
    with serve(make_engine(context=256)) as url:
        for _ in range(3):
            chat(url, max_tokens=20)
        series = scrape(url)
    queue, prefill, decode = (
        value(series, f"request_{part}_time_seconds_sum") for part in ("queue", "prefill", "decode")
    )
    assert queue >= 0
    assert prefill > 0
    assert decode > 0
    assert queue + prefill + decode == pytest.approx(value(series, "e2e_request_latency_seconds_sum"))
    assert queue + prefill == pytest.approx(value(series, "time_to_first_token_seconds_sum"))
    assert prefill + decode == pytest.approx(value(series, "request_inference_time_seconds_sum"))


def test_shows_what_runs_and_a_client_that_leaves(serve, endless_engine):
    with serve(endless_engine) as url:
        body = {"messages": [{"role": "user", "content": "go"}], "temperature": 0, "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()  # kept: without it the connection is closed
            next(lines)
            during = scrape(url)
        assert value(during, "num_requests_running") == 1
        assert 0 < value(during, "kv_cache_usage_perc") <= 1
        after = until(url, lambda s: value(s, "request_success_total", finished_reason="abort") == 1)
        assert value(after, "request_success_total", finished_reason="error") == 0
        assert value(after, "e2e_request_latency_seconds_count") == 0  # cut short, it would look fast
        after = until(url, lambda s: value(s, "num_requests_running") == 0)
        assert value(after, "kv_cache_usage_perc") == 0


def until(url: str, holds) -> Series:
    deadline = time.monotonic() + 60
    while not holds(series := scrape(url)):
        assert time.monotonic() < deadline, "never came true"
        time.sleep(0.02)
    return series


def test_counts_http_answers_by_route_and_status(url):
    before = scrape(url)
    assert httpx.get(f"{url}/v1/models").status_code == 200
    assert httpx.get(f"{url}/v1/models/nope").status_code == 404
    assert httpx.get(f"{url}/no/such/route").status_code == 404
    assert chat(url, messages=[]).status_code == 400
    after = scrape(url)

    def counted(**labels: str) -> float:
        key = ("nanoworks:http_requests_total", tuple(sorted(labels.items())))
        return after[key] - before.get(key, 0)

    assert counted(method="GET", handler="/v1/models", status="200") == 1
    assert counted(method="GET", handler="/v1/models/{model_id:path}", status="404") == 1
    assert counted(method="GET", handler="other", status="404") == 1
    assert counted(method="POST", handler="/v1/chat/completions", status="400") == 1


def test_what_a_client_sends_makes_no_new_series(url):
    chat(url, max_tokens=1)
    before = scrape(url)
    for i in range(20):
        httpx.get(f"{url}/made/up/{i}")
        httpx.request(f"VERB{i}", f"{url}/v1/models")
        httpx.get(f"{url}/v1/models/name-{i}")
    new = set(scrape(url)) - set(before)
    assert len(new) <= 2 * 4, new


# ------------------------------------------------------------------------- failures, without a server around them


def fake_engine(error: BaseException | None = None) -> SimpleNamespace:
    stats = SimpleNamespace(
        running=3,
        waiting=4,
        blocks_used=30,
        blocks_total=40,
        steps=5,
        tokens_computed=6,
        preemptions=7,
        prefix_queries=80,
        prefix_hits=20,
        drafted=10,
        draft_accepted=4,
        kv_waste=0.25,
    )
    return SimpleNamespace(stats=lambda: stats, error=error, restarts=2, config=EngineConfig(max_num_seqs=7))


def read(metrics: Metrics, name: str, **labels: str) -> float:
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            if sample.name == f"nanoworks:{name}" and labels.items() <= sample.labels.items():
                return sample.value
    raise AssertionError(f"no {name} {labels}")


def job(**fields: object) -> SimpleNamespace:
    defaults = {
        "arrival": time.perf_counter(),
        "prompt_tokens": 5,
        "completion_tokens": 0,
        "finish_reasons": [],
        "error": None,
        "params": SamplingParams(max_tokens=8),
    }
    return SimpleNamespace(**{**defaults, **fields})


def test_shows_the_engines_gauges():
    metrics = Metrics(fake_engine(), model_name="tiny")
    assert read(metrics, "num_requests_running") == 3
    assert read(metrics, "num_requests_waiting") == 4
    assert read(metrics, "max_num_seqs") == 7
    assert read(metrics, "engine_restarts_total") == 2
    assert read(metrics, "kv_cache_usage_perc") == 0.75
    assert read(metrics, "kv_cache_waste_perc") == 0.25
    assert read(metrics, "num_preemptions_total") == 7
    assert read(metrics, "prefix_cache_queries_total") == 80
    assert read(metrics, "prefix_cache_hits_total") == 20
    assert read(metrics, "spec_decode_draft_acceptance_rate") == 0.4
    assert read(Metrics(fake_engine(RuntimeError()), model_name="tiny"), "engine_up") == 0


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ApiError(503, "the engine died"), "error"),
        (ApiError(400, "a grammar that cannot be"), "abort"),
        (None, "abort"),
    ],
)
def test_tells_failures_of_ours_from_those_of_the_client(error, reason):
    async def run() -> Metrics:
        metrics = Metrics(fake_engine(), model_name="tiny")
        work = job(error=error, params=SamplingParams(max_tokens=8, n=2), finish_reasons=["stop"])
        await metrics.admit(work)
        metrics.delta(work, Delta("id", 0, token_ids=[1], queue_seconds=0.5))
        await metrics.finished(work)
        return metrics

    metrics = asyncio.run(run())
    assert read(metrics, "request_success_total", finished_reason="stop") == 1
    assert read(metrics, "request_success_total", finished_reason=reason) == 1
    assert read(metrics, "e2e_request_latency_seconds_count") == 0
    assert metrics._watched == {}  # nothing is kept of a request that is over


def test_an_embedding_has_a_duration_and_no_token():
    async def run() -> Metrics:
        metrics = Metrics(fake_engine(), model_name="tiny")
        work = job(finish_reasons=["length"])
        await metrics.admit(work)
        metrics.delta(work, Delta("id", 0, embedding=[1.0], queue_seconds=0.0, finish_reason="length"))
        await metrics.finished(work)
        return metrics

    metrics = asyncio.run(run())
    assert read(metrics, "prompt_tokens_total") == 5
    assert read(metrics, "e2e_request_latency_seconds_count") == 1
    assert read(metrics, "time_to_first_token_seconds_count") == 0
