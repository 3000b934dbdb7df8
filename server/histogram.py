"""A Prometheus histogram for the hot path: an observation is one `bisect` and two additions.

`prometheus_client.Histogram` takes a lock and walks its buckets, about a microsecond each time; an inter-token latency
is observed for every token of every stream.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily


class LabelledHistogram:
    """A histogram for each value of one label.

    Observed from one thread, read from any.

    Args:
        name: Metric name with its unit.
        documentation: Help text.
        label: Name of the label.
        values: All values of the label; each has its series from the start.
        bounds: Upper bounds of the buckets, increasing; a last one without bound is added.
    """

    def __init__(
        self, name: str, documentation: str, label: str, values: Iterable[str], bounds: Sequence[float]
    ) -> None:
        self._name, self._documentation, self._label = name, documentation, label
        self._bounds = tuple(bounds)
        self._counts = {value: [0] * (len(self._bounds) + 1) for value in values}
        self._sums = dict.fromkeys(self._counts, 0.0)

    def observe(self, value: str, amount: float, times: int = 1) -> None:
        """Count `amount` as having been seen `times` times in the series of a label value."""
        self._counts[value][bisect_left(self._bounds, amount)] += times
        self._sums[value] += amount * times

    def collect(self) -> HistogramMetricFamily:
        """The histogram in the form of the exposition format."""
        family = HistogramMetricFamily(self._name, self._documentation, labels=[self._label])
        edges = [str(bound) for bound in self._bounds] + ["+Inf"]
        for value, counts in self._counts.items():
            family.add_metric([value], list(zip(edges, accumulate(counts), strict=True)), self._sums[value])
        return family
