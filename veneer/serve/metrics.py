"""What Prometheus reads: totals and states of the engine, and how long people wait."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from veneer.serve.service import Service

WAITS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 6, 15, 60)


class Metrics:
    """The metrics of one service, in a registry of their own."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self.first = Histogram(
            "veneer_first_token_seconds", "From arrival to the first token", registry=self.registry, buckets=WAITS
        )
        self.whole = Histogram(
            "veneer_request_seconds", "From arrival to the last token", registry=self.registry, buckets=WAITS
        )

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self.registry)

    def finished(self, request: Any) -> None:
        """Count a request that has ended."""
        if request.first is not None:
            self.first.observe(max(0.0, request.first - request.arrival))
        finished = self.service.engine.clock() if request.finished is None and request.enough else request.finished
        if finished is not None:
            self.whole.observe(max(0.0, finished - request.arrival))

    def collect(self) -> Iterator[Any]:
        """Read the engine's own counts."""
        engine = self.service.engine
        totals, bank, pool = engine.totals, engine.bank, engine.pool
        counters = {
            "generated_tokens": totals.tokens,
            "prompt_tokens": totals.prompt_tokens,
            "reused_prompt_tokens": totals.reused_tokens,
            "steps": totals.steps,
            "decoded_rows": totals.rows,
            "decoded_adapters": totals.adapters,
            "requests": totals.requests,
            "requests_refused": totals.refused,
            "requests_preempted": totals.preempted,
            "adapter_loads": bank.loads,
            "adapter_evictions": bank.evictions,
            "adapter_hits": bank.hits,
            "adapter_misses": bank.misses,
            "adapter_bytes_loaded": bank.bytes_loaded,
        }
        gauges = {
            "requests_running": len(engine.running),
            "requests_waiting": len(engine.waiting),
            "adapters_registered": len(bank.entries),
            "adapters_resident": bank.resident,
            "pages_total": pool.pages,
            "pages_free": pool.free,
            "pages_kept_prefixes": engine.prefixes.idle,
        }
        for name, value in counters.items():
            yield CounterMetricFamily(f"veneer_{name}", name.replace("_", " "), value=value)
        for name, value in gauges.items():
            yield GaugeMetricFamily(f"veneer_{name}", name.replace("_", " "), value=value)
        ended = CounterMetricFamily("veneer_requests_ended", "requests by how they ended", labels=["reason"])
        for reason, count in sorted(totals.reasons.items()):
            ended.add_metric([reason], count)
        yield ended
