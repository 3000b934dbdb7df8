"""Zeros, out of the server's metrics."""

import pytest

from siluette_client import InvalidAnswer, Sparsity
from siluette_client.sparsity import parse_sparsity

METRICS = """\
# HELP siluette_ffn_zeros_total Activated gate values that are 0
# TYPE siluette_ffn_zeros_total counter
siluette_ffn_zeros_total{layer="0",mode="relu"} 30.0
siluette_ffn_zeros_total{layer="1",mode="relu"} 90.0
siluette_ffn_zeros_total{layer="0",mode="silu"} 0.0
siluette_ffn_zeros_total{layer="1",mode="silu"} 0.0
siluette_ffn_elements_total{mode="relu",layer="1"} 1e+02
siluette_ffn_elements_total{mode="relu",layer="0"} 1e+02
siluette_ffn_elements_total{mode="silu",layer="0"} 0.0
siluette_ffn_elements_total{mode="silu",layer="1"} 0.0
siluette_ffn_sparsity_ratio{mode="relu"} 0.6
"""


def test_by_mode_and_by_layer() -> None:
    modes = parse_sparsity(METRICS)

    assert modes["relu"] == Sparsity((30, 90), (100, 100))
    assert modes["relu"].ratio == 0.6
    assert modes["relu"].by_layer == [0.3, 0.9]
    assert modes["silu"].ratio is None
    assert modes["silu"].by_layer == [None, None]


def test_between_two_readings() -> None:
    assert Sparsity((30, 90), (100, 100)).since(Sparsity((20, 50), (50, 50))).by_layer == [0.2, 0.8]


def test_readings_of_two_servers_are_refused() -> None:
    with pytest.raises(ValueError, match="started anew"):
        Sparsity((1,), (9,)).since(Sparsity((2,), (9,)))
    with pytest.raises(ValueError, match="1 and 2 layers"):
        Sparsity((1, 1), (9, 9)).since(Sparsity((2,), (9,)))


@pytest.mark.parametrize(
    "metrics",
    [
        "",
        "<html>",
        METRICS.replace("siluette", "other"),
        METRICS.replace('layer="1"', 'layer="one"'),
        METRICS.replace('elements_total{mode="relu",layer="1"}', "x{}"),
        METRICS.replace("90.0", "NaN"),
        METRICS.replace("90.0", "+Inf"),
        METRICS.replace("mode", "kind"),
    ],
)
def test_other_metrics_are_named(metrics: str) -> None:
    with pytest.raises(InvalidAnswer, match="metrics"):
        parse_sparsity(metrics)
