"""The engine's own counts as metrics, read when somebody looks, so that they cost nothing while it works."""

from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from engine import ActivationMode, AsyncEngine, EngineStats
from server import metrics_catalogue as catalogue
from server.metrics_catalogue import MetricSpec
from server.version import VERSION

MAX_LAYER_GROUPS = 16

_GAUGES: dict[MetricSpec, Callable[[EngineStats], float]] = {
    catalogue.REQUESTS_RUNNING: lambda s: s.running,
    catalogue.REQUESTS_WAITING: lambda s: s.waiting,
    catalogue.KV_BLOCKS: lambda s: s.kv_blocks_total,
    catalogue.KV_BLOCKS_CACHED: lambda s: s.kv_blocks_cached,
    catalogue.KV_USAGE: lambda s: s.kv_blocks_used / max(1, s.kv_blocks_total),
}

_COUNTERS: dict[MetricSpec, Callable[[EngineStats], float]] = {
    catalogue.PREFIX_QUERIES: lambda s: s.prefix_cache_queries,
    catalogue.PREFIX_HITS: lambda s: s.prefix_cache_hits,
    catalogue.PREEMPTIONS: lambda s: s.preemptions,
    catalogue.STEPS: lambda s: s.steps,
    catalogue.STEP_SECONDS: lambda s: s.step_seconds,
    catalogue.WEIGHT_BYTES: lambda s: s.weight_bytes_read,
    catalogue.STOCHASTIC_NEGATIVES: lambda s: s.negatives,
    catalogue.STOCHASTIC_KEPT: lambda s: s.negatives_kept,
    catalogue.STOCHASTIC_EXPECTED: lambda s: s.negatives_expected,
}

# One label, a value for each key.
_LABELLED: dict[MetricSpec, Callable[[EngineStats], dict[str, float]]] = {
    catalogue.FFN_ROWS: lambda s: {**s.ffn_rows},
    catalogue.FFN_NEURONS: lambda s: {**s.ffn_neurons},
    catalogue.PHASE_SECONDS: lambda s: s.phase_seconds,
}


class EngineCollector(Collector):
    """Makes metrics of an engine's facts and counts.

    Args:
        engine: Whose.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._groups = layer_groups(engine.info.num_layers)

    def describe(self) -> list[Metric]:
        """Nothing: registration then needs no first collection."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All metrics of the engine."""
        stats = self._engine.stats()
        yield self._model()
        yield _gauge(catalogue.ENGINE_UP, float(self._engine.alive))
        for spec, read in _GAUGES.items():
            yield _gauge(spec, read(stats))
        for spec, read in _COUNTERS.items():
            family = _counter(spec)
            family.add_metric([], read(stats))
            yield family
        for spec, read_all in _LABELLED.items():
            family = _counter(spec)
            for label, value in read_all(stats).items():
                family.add_metric([label], value)
            yield family
        yield from self._zeros(stats)
        yield _flops(stats)

    def _model(self) -> Metric:
        info, spec = self._engine.info, catalogue.MODEL
        facts = (info.name, info.architecture, info.dtype, info.quantization, VERSION)
        return InfoMetricFamily(spec.family, spec.documentation, value=dict(zip(spec.labels, facts, strict=True)))

    def _zeros(self, stats: EngineStats) -> Iterator[Metric]:
        zeros, elements = _counter(catalogue.FFN_ZEROS), _counter(catalogue.FFN_ELEMENTS)
        spec = catalogue.FFN_SPARSITY
        sparsity = GaugeMetricFamily(spec.family, spec.documentation, labels=spec.labels)
        for mode in ActivationMode:
            for family, counts in ((zeros, stats.ffn_zeros[mode]), (elements, stats.ffn_elements[mode])):
                for name, layers in self._groups.items():
                    family.add_metric([mode, name], sum(counts[layers.start : layers.stop]))
            if total := sum(stats.ffn_elements[mode]):
                sparsity.add_metric([mode], sum(stats.ffn_zeros[mode]) / total)
        yield from (zeros, elements, sparsity)


def layer_groups(num_layers: int) -> dict[str, range]:
    """Neighbouring layers in at most `MAX_LAYER_GROUPS` groups of one size, the last perhaps smaller, by name.

    30 layers are "00-01" to "28-29"; a group of one layer is just "07".
    """
    size = -(-num_layers // MAX_LAYER_GROUPS)
    digits = len(str(num_layers - 1))
    groups = [range(first, min(first + size, num_layers)) for first in range(0, num_layers, size)]
    return {"-".join(f"{layer:0{digits}}" for layer in _ends(group)): group for group in groups}


def _ends(group: range) -> Sequence[int]:
    return group if len(group) == 1 else (group[0], group[-1])


def _flops(stats: EngineStats) -> Metric:
    family = _counter(catalogue.FFN_FLOPS)
    for mode in ActivationMode:
        skipped = stats.ffn_flops_skipped if mode is ActivationMode.RELU else 0
        family.add_metric([mode, "computed"], stats.ffn_flops[mode] - skipped)
        family.add_metric([mode, "skipped"], skipped)
    return family


def _gauge(spec: MetricSpec, value: float) -> Metric:
    return GaugeMetricFamily(spec.family, spec.documentation, value)


def _counter(spec: MetricSpec) -> CounterMetricFamily:
    return CounterMetricFamily(spec.family, spec.documentation, labels=spec.labels)
