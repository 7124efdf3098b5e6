"""These endpoints report the server's load: /metrics for Prometheus and /v1/loads for routers, in SGLang's names."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from time import perf_counter
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

import slime_spec
from rollout.embedded.http.json_io import json_response
from rollout.embedded.http.serving import Serving
from slime_spec.errors import ConfigError
from slime_spec.sglang.draft_shape import embedded_shape
from slime_spec.types import GeneratedSample

LABEL = "model_name"
SECTIONS = {"all", "core", "memory", "spec", "lora", "disagg", "queues"}  # that SGLang's clients ask /v1/loads for
SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10, 20, 40, 60, 80, 100, 200, 400, 600, 1200)
# Name, meaning; "sglang:" goes before the name.
GAUGES = {
    "num_running_reqs": "Samples that are being generated.",
    "num_queue_reqs": "Samples that wait.",
    "num_used_tokens": "KV positions in use.",
    "max_total_num_tokens": "KV positions that there are.",
    "token_usage": "The share of the KV positions that is in use.",
    "gen_throughput": "Tokens per second, over the last ten seconds.",
    "cache_hit_rate": "The share of prompt tokens whose KV was not computed again.",
    "spec_accept_length": "Mean tokens of a round, bonus token included; 0 before the first round.",
    "spec_accept_rate": "Accepted drafts by proposed drafts; 0 before the first round.",
    "spec_num_steps": "Draft steps of a round.",
    "spec_num_draft_tokens": "Tokens that a round verifies.",
}
COUNTERS = {
    "prompt_tokens": "Prompt tokens of answered samples.",
    "generation_tokens": "Generated tokens of answered samples.",
    "cached_tokens": "Prompt tokens whose KV was not computed again.",
    "num_requests": "Answered samples.",
    "num_aborted_requests": "Samples that were aborted.",
    "num_retracted_requests": "How often a sample's KV was freed for lack of room.",
    "spec_verify_calls": "Speculative rounds of answered samples.",
}


class Load:
    """Reads the load of one server."""

    def __init__(self, serving: Serving) -> None:
        self._engine, self._totals = serving.engine, serving.totals
        self._throughput = serving.generations.throughput
        algorithm = serving.config.speculative.record
        shape = embedded_shape(serving.config.speculative, serving.spec.architecture)
        self._num_steps = shape.num_steps if algorithm.speculates else 0
        self._num_draft_tokens = shape.num_draft_tokens if algorithm.speculates else 0

    def gauges(self) -> dict[str, float]:
        """Return the numbers of GAUGES as they are now."""
        stats, totals = self._engine.stats(), self._totals
        return {
            "num_running_reqs": stats.num_running,
            "num_queue_reqs": stats.num_waiting,
            "num_used_tokens": stats.kv_tokens_used,
            "max_total_num_tokens": stats.kv_tokens_capacity,
            "token_usage": stats.kv_tokens_used / stats.kv_tokens_capacity,
            "gen_throughput": self._throughput.per_second(),
            "cache_hit_rate": totals.num_cached_tokens / totals.num_prompt_tokens if totals.num_prompt_tokens else 0.0,
            "spec_accept_length": totals.mean_accept_length or 0.0,
            "spec_accept_rate": totals.accept_rate or 0.0,
            "spec_num_steps": self._num_steps,
            "spec_num_draft_tokens": self._num_draft_tokens,
        }

    def counters(self) -> dict[str, float]:
        """Return the numbers of COUNTERS since the server started."""
        totals = self._totals
        return {
            "prompt_tokens": totals.num_prompt_tokens,
            "generation_tokens": totals.num_tokens,
            "cached_tokens": totals.num_cached_tokens,
            "num_requests": totals.num_samples,
            "num_aborted_requests": totals.num_aborted,
            "num_retracted_requests": self._engine.stats().num_preemptions,
            "spec_verify_calls": totals.num_rounds,
        }


class LoadCollector(Collector):
    """Gives Prometheus the load at the moment of a scrape."""

    def __init__(self, load: Load, model_name: str) -> None:
        self._load, self._labels = load, [model_name]

    def collect(self) -> Iterator[Metric]:
        for name, value in self._load.gauges().items():
            gauge = GaugeMetricFamily(f"sglang:{name}", GAUGES[name], labels=[LABEL])
            gauge.add_metric(self._labels, value)
            yield gauge
        for name, value in self._load.counters().items():
            counter = CounterMetricFamily(f"sglang:{name}", COUNTERS[name], labels=[LABEL])
            counter.add_metric(self._labels, value)
            yield counter


class LoadRoutes:
    """Handles /metrics, /v1/loads and /get_load."""

    def __init__(self, serving: Serving) -> None:
        self._load, name = Load(serving), serving.model_name
        self._max_running = serving.config.engine.max_running_requests
        self._registry = CollectorRegistry()  # of this server alone: a process may have several
        self._registry.register(LoadCollector(self._load, name))

        def histogram(metric: str, meaning: str) -> Histogram:
            made = Histogram(f"sglang:{metric}", meaning, [LABEL], registry=self._registry, buckets=SECONDS)
            return made.labels(name)

        self._first_token = histogram("time_to_first_token_seconds", "From a sample's arrival to its first token.")
        self._latency = histogram("e2e_request_latency_seconds", "From a sample's arrival to its end.")
        self._wait = histogram("queue_time_seconds", "From a sample's arrival to its admission.")
        serving.totals.watchers.append(self._observe)

    def routes(self) -> list[web.RouteDef]:
        of_loads = web.get("/v1/loads", self._loads), web.get("/get_load", self._older_load)
        return [web.get("/metrics", self._metrics), *of_loads]

    def _observe(self, sample: GeneratedSample) -> None:
        self._latency.observe(sample.e2e_latency_s)
        if sample.first_token_s is not None:
            self._first_token.observe(sample.first_token_s)
        if sample.wait_s is not None:
            self._wait.observe(sample.wait_s)

    async def _metrics(self, request: web.Request) -> web.Response:
        """Report the load in Prometheus' text format."""
        return web.Response(body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _loads(self, request: web.Request) -> web.Response:
        """Report the load to a router, as SGLang does for its one rank, with the sums of its older releases."""
        sections = set(request.query.get("include", "all").replace(" ", "").split(","))
        if unknown := sorted(sections - SECTIONS):
            raise ConfigError("include", f"must be among {', '.join(sorted(SECTIONS))}", unknown[0], "Leave it out.")
        if request.query.get("dp_rank", "0") != "0":
            raise ConfigError("dp_rank", "must be 0: there is one rank", request.query["dp_rank"], "Leave it out.")
        gauges: dict[str, Any] = self._load.gauges()
        rounds = {"accept_length": gauges.pop("spec_accept_length"), "accept_rate": gauges.pop("spec_accept_rate")}
        waiting = gauges.pop("num_queue_reqs")
        load = {
            "dp_rank": 0,
            **{name: value for name, value in gauges.items() if not name.startswith("spec_")},
            "num_waiting_reqs": waiting,
            "num_total_reqs": gauges["num_running_reqs"] + waiting,
            "num_total_tokens": gauges["num_used_tokens"],
            "max_running_requests": self._max_running,
            "utilization": min(1.0, gauges["num_running_reqs"] / self._max_running),
        }
        if sections & {"spec", "all"}:
            load["speculative"] = rounds
        sums = {
            "total_running_reqs": load["num_running_reqs"],
            "total_waiting_reqs": waiting,
            "total_reqs": load["num_total_reqs"],
            "avg_token_usage": load["token_usage"],
            "avg_throughput": load["gen_throughput"],
            "avg_utilization": load["utilization"],
        }
        now = datetime.now(UTC).isoformat()
        head = {"timestamp": now, "version": slime_spec.__version__, "num_accelerators": 1, "dp_rank_count": 1}
        return json_response({**head, "loads": [load], "aggregate": sums})

    async def _older_load(self, request: web.Request) -> web.Response:
        """Report requests and tokens as releases of SGLang did before /v1/loads."""
        gauges = self._load.gauges()
        load = {
            "dp_rank": 0,
            "num_reqs": gauges["num_running_reqs"] + gauges["num_queue_reqs"],
            "num_waiting_reqs": gauges["num_queue_reqs"],
            "num_tokens": gauges["num_used_tokens"],
            "num_pending_tokens": 0,
        }
        return json_response([{**load, "ts_tic": perf_counter()}])
