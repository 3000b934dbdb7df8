"""What the HTTP layer counts, and the registry that `/metrics` shows. Names are in `server.metrics_catalogue`."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, GCCollector, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from engine import ActivationMode, AsyncEngine, FinishReason, RequestOutput
from server import metrics_catalogue as catalogue
from server.histogram import LabelledHistogram
from server.metrics_catalogue import MetricSpec
from server.metrics_engine import EngineCollector

FIRST_TOKEN_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
INTER_TOKEN_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5)
REQUEST_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0)
QUEUE_BOUNDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKEN_BOUNDS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 32768, 131072)

_WORST_FIRST = (FinishReason.ERROR, FinishReason.ABORT, FinishReason.LENGTH, FinishReason.STOP)


class ServerMetrics:
    """What the HTTP layer counts, and the registry of all metrics.

    Args:
        engine: Whose counts are shown beside those of the HTTP layer.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self.registry = CollectorRegistry()
        self.http_requests = self._counter(catalogue.HTTP_REQUESTS)
        self.requests = self._counter(catalogue.REQUESTS)
        self.prompt_tokens = self._counter(catalogue.PROMPT_TOKENS)
        self.generation_tokens = dict.fromkeys(ActivationMode, 0)  # a lock for each token would be too much
        self.request_prompt_tokens = self._histogram(catalogue.REQUEST_PROMPT_TOKENS, TOKEN_BOUNDS)
        self.request_generation_tokens = self._histogram(catalogue.REQUEST_GENERATION_TOKENS, TOKEN_BOUNDS)
        self.queue_time = self._histogram(catalogue.QUEUE_TIME, QUEUE_BOUNDS)
        self.prefill_time = self._histogram(catalogue.PREFILL_TIME, FIRST_TOKEN_BOUNDS)
        self.first_token = self._histogram(catalogue.FIRST_TOKEN, FIRST_TOKEN_BOUNDS)
        self.decode_time = self._histogram(catalogue.DECODE_TIME, REQUEST_BOUNDS)
        self.request_latency = self._histogram(catalogue.REQUEST_LATENCY, REQUEST_BOUNDS)
        spec = catalogue.INTER_TOKEN
        self.inter_token = LabelledHistogram(
            spec.family, spec.documentation, spec.labels[0], list(ActivationMode), INTER_TOKEN_BOUNDS
        )
        self._declare_series()
        self.registry.register(_TokenCollector(self.inter_token, self.generation_tokens))
        self.registry.register(EngineCollector(engine))
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)

    def _counter(self, spec: MetricSpec) -> Counter:
        return Counter(spec.family, spec.documentation, spec.labels, registry=self.registry)

    def _histogram(self, spec: MetricSpec, bounds: tuple[float, ...]) -> Histogram:
        return Histogram(spec.family, spec.documentation, spec.labels, buckets=bounds, registry=self.registry)

    def _declare_series(self) -> None:
        """Series that appear with their first event have no rate until the second: show them from the start."""
        by_mode = (
            self.prompt_tokens,
            self.request_prompt_tokens,
            self.request_generation_tokens,
            self.queue_time,
            self.prefill_time,
            self.first_token,
            self.decode_time,
            self.request_latency,
        )
        for mode in ActivationMode:
            for metric in by_mode:
                metric.labels(mode)
            for reason in FinishReason:
                self.requests.labels(mode, reason)

    def observe_prompt(self, mode: ActivationMode, prompt_tokens: int) -> "PromptObserver":
        """Begin to observe one prompt in the engine."""
        self.prompt_tokens.labels(mode).inc(prompt_tokens)
        self.request_prompt_tokens.labels(mode).observe(prompt_tokens)
        return PromptObserver(self, mode)


@dataclass(slots=True)
class PromptTimes:
    """What happened to a prompt, and when: seconds of `time.perf_counter`; None for what has not happened."""

    submitted: float
    admitted: float | None = None
    first_token: float | None = None
    ended: float | None = None
    tokens: int = 0  # generated, of all samples
    reasons: dict[int, FinishReason] = field(default_factory=dict)  # of the samples that ended by themselves
    reason: FinishReason | None = None  # of the prompt


class PromptObserver:
    """Times of one prompt's tokens. What costs more than an addition happens once, at the first token or at the end."""

    def __init__(self, metrics: ServerMetrics, mode: ActivationMode) -> None:
        self._metrics, self._mode = metrics, mode
        self.times = PromptTimes(submitted=time.perf_counter())
        self._last_token: dict[int, float] = {}  # by sample

    def piece(self, piece: RequestOutput) -> None:
        """Some tokens have arrived."""
        now, times = time.perf_counter(), self.times
        for sample in piece.samples:
            count = len(sample.token_ids)
            if count:
                times.tokens += count
                self._metrics.generation_tokens[self._mode] += count
                before = self._last_token.get(sample.index)
                if before is not None:
                    self._metrics.inter_token.observe(self._mode, (now - before) / count, count)
                elif times.first_token is None:
                    self._first_token(now, piece.queue_seconds)
                self._last_token[sample.index] = now
            if sample.finish_reason is not None:
                times.reasons[sample.index] = sample.finish_reason

    def _first_token(self, now: float, queue_seconds: float) -> None:
        metrics, mode, times = self._metrics, self._mode, self.times
        times.first_token = now
        # The engine's clock started a little before ours, by as much as it took to make the other prompts' requests.
        times.admitted = min(times.submitted + queue_seconds, now)
        metrics.queue_time.labels(mode).observe(queue_seconds)
        metrics.prefill_time.labels(mode).observe(now - times.admitted)
        metrics.first_token.labels(mode).observe(now - times.submitted)

    def finished(self) -> None:
        """Every sample has ended by itself."""
        times = self.times
        self._end(min(times.reasons.values(), key=_WORST_FIRST.index))
        assert times.ended is not None
        self._metrics.request_latency.labels(self._mode).observe(times.ended - times.submitted)
        if times.first_token is not None:
            self._metrics.decode_time.labels(self._mode).observe(times.ended - times.first_token)

    def aborted(self) -> None:
        """The client left, or another prompt of the same request was refused."""
        self._end(FinishReason.ABORT)

    def failed(self) -> None:
        """The engine failed."""
        self._end(FinishReason.ERROR)

    def _end(self, reason: FinishReason) -> None:
        metrics, mode, times = self._metrics, self._mode, self.times
        times.ended, times.reason = time.perf_counter(), reason
        metrics.request_generation_tokens.labels(mode).observe(times.tokens)
        metrics.requests.labels(mode, reason).inc()


class _TokenCollector(Collector):
    """Shows what is counted for every token, by faster means than prometheus-client's."""

    def __init__(self, inter_token: LabelledHistogram, generated: Mapping[ActivationMode, int]) -> None:
        self._inter_token, self._generated = inter_token, generated

    def describe(self) -> list[Metric]:
        """Nothing: registration then needs no first collection."""
        return []

    def collect(self) -> list[Metric]:
        """The metrics as they are now."""
        spec = catalogue.GENERATION_TOKENS
        tokens = CounterMetricFamily(spec.family, spec.documentation, labels=spec.labels)
        for mode, count in self._generated.items():
            tokens.add_metric([mode], count)
        return [self._inter_token.collect(), tokens]
