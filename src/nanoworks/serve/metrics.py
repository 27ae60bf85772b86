"""What /metrics says: the names that vLLM made common, under `nanoworks:` and once more under `vllm:`.

    metrics = Metrics(engine, model_name="tiny")    # an observer of every generation
    metrics.text()                                  # for Prometheus to scrape

Times are seconds, usage is a share from 0 to 1, and every series has the label `model_name`. What requests did is
counted as they go by; what the engine holds is asked of it when somebody scrapes. Probes of the server itself are no
requests, so they are in neither. `FAMILIES` in tests/serve/test_metrics.py is the list that must stay.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanoworks.engine import Delta
from nanoworks.serve.observer import Observer
from nanoworks.serve.stream import CLIENT_LEFT

if TYPE_CHECKING:
    from nanoworks.engine.client import EngineClient
    from nanoworks.serve.generation import Generation

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OURS = "nanoworks:"

# In a line of the text format: what a name begins with, and the lines of when a counter began, which nobody asks for.
_NAMES = re.compile(rb"^(# \w+ )?nanoworks:", re.MULTILINE)
_CREATED = re.compile(rb"^(# \w+ )?nanoworks:\w+_created[ {].*\n", re.MULTILINE)

# From a token of a small model on a GPU to a request that waited minutes: about three bounds a decade.
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10)
_REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_SAMPLES = (1, 2, 5, 10, 20, 50, 100)

_METHODS = {"GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE"}


@dataclass
class _Watched:
    """A generation under way. Times are those of `time.perf_counter`."""

    first: float | None = None
    """When its first token came."""
    newest: dict[int, float] = field(default_factory=dict)
    """When each sample's newest token came."""
    queue_seconds: float | None = None


class Metrics(Observer):
    """One app's metrics, in a registry of their own."""

    def __init__(self, engine: EngineClient, *, model_name: str) -> None:
        self._registry, self._process = CollectorRegistry(), CollectorRegistry()
        ProcessCollector(registry=self._process)  # of this process: memory, CPU seconds, open files
        self._watched: dict[int, _Watched] = {}
        labels = {"model_name": model_name}

        def counter(name: str, text: str) -> Counter:
            return Counter(OURS + name, text, list(labels), registry=self._registry).labels(**labels)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(OURS + name, text, list(labels), registry=self._registry, buckets=buckets)
            return made.labels(**labels)

        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts whose answer began.")
        self._generation_tokens = counter("generation_tokens", "Tokens of answers.")
        self._ttft = histogram("time_to_first_token_seconds", "From arrival to the first token.", _REQUEST_SECONDS)
        self._itl = histogram("inter_token_latency_seconds", "From one token of an answer to the next.", _TOKEN_SECONDS)
        self._tpot = histogram(
            "request_time_per_output_token_seconds", "Mean time of a token after the first.", _TOKEN_SECONDS
        )
        self._e2e = histogram("e2e_request_latency_seconds", "From arrival to the end of the answer.", _REQUEST_SECONDS)
        self._queue = histogram("request_queue_time_seconds", "From arrival to the first step.", _REQUEST_SECONDS)
        self._prefill = histogram(
            "request_prefill_time_seconds", "From the first step to the first token.", _REQUEST_SECONDS
        )
        self._decode = histogram(
            "request_decode_time_seconds", "From the first token to the end of the answer.", _REQUEST_SECONDS
        )
        self._inference = histogram(
            "request_inference_time_seconds", "From the first step to the end of the answer.", _REQUEST_SECONDS
        )
        self._request_prompt = histogram("request_prompt_tokens", "Tokens of a request's prompt.", _TOKENS)
        self._request_generation = histogram("request_generation_tokens", "Tokens of a request's answers.", _TOKENS)
        self._request_max = histogram("request_params_max_tokens", "max_tokens that a request asked for.", _TOKENS)
        self._request_n = histogram("request_params_n", "Answers that a request asked for.", _SAMPLES)
        finished = Counter(
            f"{OURS}request_success",
            "Answers that ended: stop, length, abort (the client left, or asked for what cannot be), error (ours).",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._finished = {
            reason: finished.labels(model_name, reason) for reason in ("stop", "length", "abort", "error")
        }
        self._http = Counter(
            f"{OURS}http_requests",
            "HTTP requests answered, by route and status; `other` is a route that there is not, or none reached.",
            ["model_name", "method", "handler", "status"],
            registry=self._registry,
        )
        self._model_name = model_name
        self._registry.register(_EngineCollector(engine, model_name))

    def text(self) -> bytes:
        """Everything of now, in Prometheus' text format."""
        ours = _CREATED.sub(b"", generate_latest(self._registry))
        return ours + _NAMES.sub(rb"\1vllm:", ours) + generate_latest(self._process)

    # ---------------------------------------------------------------------------------- what the server tells us

    async def admit(self, job: Generation) -> None:
        self._watched[id(job)] = _Watched()

    def delta(self, job: Generation, delta: Delta) -> None:
        watched = self._watched[id(job)]
        if delta.queue_seconds is not None:
            watched.queue_seconds = delta.queue_seconds
            self._queue.observe(delta.queue_seconds)
        if not delta.token_ids:
            return
        now = time.perf_counter()
        if watched.first is None:
            watched.first = now
            self._prompt_tokens.inc(job.prompt_tokens)
            self._ttft.observe(now - job.arrival)
        else:
            before = watched.newest.get(delta.index)
            if before is not None:
                self._itl.observe(now - before)
        watched.newest[delta.index] = now
        self._generation_tokens.inc(len(delta.token_ids))

    async def finished(self, job: Generation) -> None:
        watched = self._watched.pop(id(job))
        now = time.perf_counter()
        whole = [reason for reason in job.finish_reasons if reason in ("stop", "length")]
        broken = job.params.n - len(whole)
        for reason in whole:
            self._finished[reason].inc()
        self._finished["error" if job.error is not None and job.error.status >= 500 else "abort"].inc(broken)
        if broken:
            return  # a time that was cut short says nothing about the others
        queue = watched.queue_seconds or 0.0
        self._e2e.observe(now - job.arrival)
        self._inference.observe(now - job.arrival - queue)
        self._request_prompt.observe(job.prompt_tokens)
        self._request_generation.observe(job.completion_tokens)
        self._request_max.observe(job.params.max_tokens)
        self._request_n.observe(job.params.n)
        if watched.first is None:
            self._prompt_tokens.inc(job.prompt_tokens)  # an embedding, or an answer of no token
            return
        self._prefill.observe(watched.first - job.arrival - queue)
        self._decode.observe(now - watched.first)
        if job.completion_tokens > job.params.n:
            self._tpot.observe((now - watched.first) * job.params.n / (job.completion_tokens - job.params.n))

    def answered(self, scope: Scope, status: int) -> None:
        """Count an HTTP answer. Args: `scope`, after routing."""
        method = scope["method"] if scope["method"] in _METHODS else "other"
        handler = getattr(scope.get("route"), "path", "other")
        self._http.labels(self._model_name, method, handler, str(status)).inc()


class CountAnswers:
    """ASGI middleware around all others, which tells `metrics` the status of every answer."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        status: int | None = None

        async def counting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, counting)
        except Exception:
            status = status or 500  # Starlette answers so, outside of every middleware
            raise
        finally:
            self._metrics.answered(scope, status or CLIENT_LEFT)


class _EngineCollector(Collector):
    """The engine's own gauges and counters, as they are at a scrape."""

    def __init__(self, engine: EngineClient, model_name: str) -> None:
        self._engine, self._model_name = engine, model_name

    def collect(self) -> Iterator[Metric]:
        stats, config = self._engine.stats(), self._engine.config
        gauges: dict[str, tuple[str, float]] = {
            "engine_up": ("1 while the engine can answer.", self._engine.error is None),
            "num_requests_running": ("Requests that take part in steps.", stats.running),
            "num_requests_waiting": ("Requests that wait for a place.", stats.waiting),
            "kv_cache_usage_perc": ("Share of KV cache blocks in use.", stats.blocks_used / max(1, stats.blocks_total)),
            "kv_cache_waste_perc": ("Share of token slots in used blocks that hold no token.", stats.kv_waste),
            "spec_decode_draft_acceptance_rate": (
                "Share of drafted tokens that were right, since the start.",
                stats.draft_accepted / max(1, stats.drafted),
            ),
            "max_num_seqs": ("Requests that can take part in a step.", config.max_num_seqs),
            "max_batch_tokens": ("Tokens that a step takes.", config.max_batch_tokens),
        }
        counters = {
            "prefix_cache_queries": ("Prompt tokens looked for in the prefix cache.", stats.prefix_queries),
            "prefix_cache_hits": ("Prompt tokens found in the prefix cache.", stats.prefix_hits),
            "num_preemptions": ("Requests that gave their KV blocks back and began again.", stats.preemptions),
            "spec_decode_num_draft_tokens": ("Tokens that speculation guessed.", stats.drafted),
            "spec_decode_num_accepted_tokens": ("Guessed tokens that were right.", stats.draft_accepted),
            "engine_steps": ("Steps of the engine.", stats.steps),
            "engine_restarts": ("Engines started after the first.", getattr(self._engine, "restarts", 0)),
            "engine_tokens_computed": (
                "Tokens that went through the model, recomputation included.",
                stats.tokens_computed,
            ),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(OURS + name, text, labels=["model_name"])
            gauge.add_metric([self._model_name], float(value))
            yield gauge
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(OURS + name, text, labels=["model_name"])
            counter.add_metric([self._model_name], float(value))
            yield counter
