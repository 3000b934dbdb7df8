"""Prometheus metrics. Every metric's name is written here only; every label takes its values from a fixed set."""

import time
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, GCCollector, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from engine import ActivationMode, AsyncEngine, EngineStats, FinishReason, RequestOutput
from server.histogram import LabelledHistogram
from server.version import VERSION

FIRST_TOKEN_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
INTER_TOKEN_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5)
REQUEST_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0)


_WORST_FIRST = (FinishReason.ERROR, FinishReason.ABORT, FinishReason.LENGTH, FinishReason.STOP)


class ServerMetrics:
    """What the HTTP layer counts, and the registry that `/metrics` shows."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.registry = CollectorRegistry()
        self.http_requests = Counter(
            "siluette_http_requests",
            "HTTP requests by route template, method and status",
            ["route", "method", "status"],
            registry=self.registry,
        )
        self.requests = Counter(
            "siluette_requests",
            "Finished prompts by mode and reason; of several samples' reasons the worst",
            ["mode", "finish_reason"],
            registry=self.registry,
        )
        self.generation_tokens = Counter(
            "siluette_generation_tokens", "Tokens generated, by activation mode", ["mode"], registry=self.registry
        )
        self.first_token = Histogram(
            "siluette_time_to_first_token_seconds",
            "From the submission of a prompt to its first token",
            ["mode"],
            buckets=FIRST_TOKEN_BOUNDS,
            registry=self.registry,
        )
        self.request_latency = Histogram(
            "siluette_e2e_request_latency_seconds",
            "From the submission of a prompt to its last token",
            ["mode"],
            buckets=REQUEST_BOUNDS,
            registry=self.registry,
        )
        self.inter_token = LabelledHistogram(
            "siluette_inter_token_latency_seconds",
            "Between one token of a sample and the next",
            "mode",
            list(ActivationMode),
            INTER_TOKEN_BOUNDS,
        )
        self._declare_series()
        self.registry.register(_EngineCollector(engine, self.inter_token))
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)

    def _declare_series(self) -> None:
        """Series that appear with their first event have no rate until the second: show them from the start."""
        for mode in ActivationMode:
            self.generation_tokens.labels(mode)
            self.first_token.labels(mode)
            self.request_latency.labels(mode)
            for reason in FinishReason:
                self.requests.labels(mode, reason)

    def observe_prompt(self, mode: ActivationMode) -> "PromptObserver":
        """Begin to observe one prompt in the engine."""
        return PromptObserver(self, mode)


class PromptObserver:
    """Times of one prompt's tokens. What costs more than an addition happens once, at the end."""

    def __init__(self, metrics: ServerMetrics, mode: ActivationMode) -> None:
        self._metrics, self._mode = metrics, mode
        self._submitted = time.perf_counter()
        self._last_token: dict[int, float] = {}  # by sample
        self._tokens = 0
        self._reasons: set[FinishReason] = set()

    def piece(self, piece: RequestOutput) -> None:
        """Some tokens have arrived."""
        now = time.perf_counter()
        for sample in piece.samples:
            count = len(sample.token_ids)
            if count:
                self._tokens += count
                before = self._last_token.get(sample.index)
                if before is not None:
                    self._metrics.inter_token.observe(self._mode, (now - before) / count, count)
                elif not self._last_token:
                    self._metrics.first_token.labels(self._mode).observe(now - self._submitted)
                self._last_token[sample.index] = now
            if sample.finish_reason is not None:
                self._reasons.add(sample.finish_reason)

    def finished(self) -> None:
        """Every sample has ended by itself."""
        self._metrics.request_latency.labels(self._mode).observe(time.perf_counter() - self._submitted)
        self._end(next(reason for reason in _WORST_FIRST if reason in self._reasons))

    def aborted(self) -> None:
        """The client left, or another prompt of the same request was refused."""
        self._end(FinishReason.ABORT)

    def failed(self) -> None:
        """The engine failed."""
        self._end(FinishReason.ERROR)

    def _end(self, reason: FinishReason) -> None:
        self._metrics.generation_tokens.labels(self._mode).inc(self._tokens)
        self._metrics.requests.labels(self._mode, reason).inc()


_GAUGES: Mapping[str, tuple[str, Callable[[EngineStats], float]]] = {
    "siluette_requests_running": ("Sequences in the running batch", lambda s: s.running),
    "siluette_requests_waiting": ("Sequences that wait for a place in the batch", lambda s: s.waiting),
    "siluette_kv_blocks": ("Blocks of the KV cache", lambda s: s.kv_blocks_total),
    "siluette_kv_blocks_cached": ("Free blocks whose content may be reused", lambda s: s.kv_blocks_cached),
    "siluette_kv_cache_usage_ratio": (
        "Share of the KV cache's blocks that live requests hold",
        lambda s: s.kv_blocks_used / max(1, s.kv_blocks_total),
    ),
}

_COUNTERS: Mapping[str, tuple[str, Callable[[EngineStats], float]]] = {
    "siluette_prompt_tokens": ("Prompt tokens of admitted requests", lambda s: s.prompt_tokens),
    "siluette_prefix_cache_queries": ("Prompt tokens looked up in the prefix cache", lambda s: s.prefix_cache_queries),
    "siluette_prefix_cache_hits": ("Prompt tokens found in the prefix cache", lambda s: s.prefix_cache_hits),
    "siluette_preemptions": ("Times a sequence gave its blocks up and was computed again", lambda s: s.preemptions),
    "siluette_engine_steps": ("Steps of the engine", lambda s: s.steps),
    "siluette_engine_step_seconds": ("Time spent in steps", lambda s: s.step_seconds),
}


class _EngineCollector(Collector):
    """Reads the engine's counts when somebody looks, so that they cost nothing while it works."""

    def __init__(self, engine: AsyncEngine, inter_token: LabelledHistogram) -> None:
        self._engine = engine
        self._inter_token = inter_token

    def describe(self) -> list[Metric]:
        return []  # registration then needs no first collection

    def collect(self) -> Iterator[Metric]:
        """All metrics that are not counted by the HTTP layer."""
        info, stats = self._engine.info, self._engine.stats()
        yield InfoMetricFamily(
            "siluette_model",
            "The served model",
            value={
                "name": info.name,
                "architecture": info.architecture,
                "dtype": info.dtype,
                "quantization": info.quantization,
                "version": VERSION,
            },
        )
        yield GaugeMetricFamily("siluette_engine_up", "1 while the engine takes requests", float(self._engine.alive))
        for name, (documentation, read) in _GAUGES.items():
            yield GaugeMetricFamily(name, documentation, read(stats))
        for name, (documentation, read) in _COUNTERS.items():
            yield CounterMetricFamily(name, documentation, read(stats))
        yield from _ffn_metrics(stats)
        yield self._inter_token.collect()


def _ffn_metrics(stats: EngineStats) -> Iterator[Metric]:
    rows = CounterMetricFamily("siluette_ffn_rows", "RELU rows of feed-forward layers, by path", labels=["path"])
    for path, count in stats.ffn_rows.items():
        rows.add_metric([path], count)
    yield rows
    zeros = CounterMetricFamily("siluette_ffn_zeros", "Activated gate values that are 0", labels=["mode", "layer"])
    elements = CounterMetricFamily("siluette_ffn_elements", "Activated gate values", labels=["mode", "layer"])
    sparsity = GaugeMetricFamily(
        "siluette_ffn_sparsity_ratio", "Share of activated gate values that are 0, since start", labels=["mode"]
    )
    for mode in ActivationMode:
        for family, counts in ((zeros, stats.ffn_zeros[mode]), (elements, stats.ffn_elements[mode])):
            for layer, count in enumerate(counts):
                family.add_metric([mode, str(layer)], count)
        if total := sum(stats.ffn_elements[mode]):
            sparsity.add_metric([mode], sum(stats.ffn_zeros[mode]) / total)
    yield from (zeros, elements, sparsity)
