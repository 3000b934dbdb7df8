"""The batch histogram agrees with prometheus_client's own."""

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram

from server.histogram import LabelledHistogram

BOUNDS = (0.1, 0.5, 1.0, 2.5)
AMOUNTS = st.one_of(st.sampled_from(BOUNDS), st.floats(0, 10))


@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), AMOUNTS, st.integers(1, 3))))
def test_same_buckets_and_counts(observations: list[tuple[str, float, int]]) -> None:
    histogram = LabelledHistogram("x_seconds", "help", "label", ["a", "b"], BOUNDS)
    reference = Histogram("x_seconds", "help", ["label"], buckets=BOUNDS, registry=CollectorRegistry())
    for label in ("a", "b"):
        reference.labels(label)
    for label, amount, times in observations:
        histogram.observe(label, amount, times)
        for _ in range(times):
            reference.labels(label).observe(amount)

    expected = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for sample in next(iter(reference.collect())).samples
        if not sample.name.endswith(("_created", "_sum"))
    }
    actual = {(sample.name, *sorted(sample.labels.items())): sample.value for sample in histogram.collect().samples}
    sums = {key: actual.pop(key) for key in list(actual) if key[0] == "x_seconds_sum"}
    assert actual == expected
    for label in ("a", "b"):
        total = sum(amount * times for name, amount, times in observations if name == label)
        assert abs(sums["x_seconds_sum", ("label", label)] - total) < 1e-9 * max(1.0, total)
