"""Zeros, out of the server's metrics."""

import pytest

from siluette_client import InvalidAnswer, Sparsity
from siluette_client.sparsity import parse_sparsity

METRICS = """\
# HELP siluette_ffn_zeros_total Activated gate values that are 0
# TYPE siluette_ffn_zeros_total counter
siluette_ffn_zeros_total{layers="0",mode="relu"} 30.0
siluette_ffn_zeros_total{layers="1",mode="relu"} 90.0
siluette_ffn_zeros_total{layers="0",mode="silu"} 0.0
siluette_ffn_zeros_total{layers="1",mode="silu"} 0.0
siluette_ffn_elements_total{mode="relu",layers="1"} 1e+02
siluette_ffn_elements_total{mode="relu",layers="0"} 1e+02
siluette_ffn_elements_total{mode="silu",layers="0"} 0.0
siluette_ffn_elements_total{mode="silu",layers="1"} 0.0
siluette_ffn_sparsity_ratio{mode="relu"} 0.6
"""


LAYERS = ("0", "1")


def test_by_mode_and_by_layers() -> None:
    modes = parse_sparsity(METRICS)

    assert modes["relu"] == Sparsity(LAYERS, (30, 90), (100, 100))
    assert modes["relu"].ratio == 0.6
    assert modes["relu"].by_layers == {"0": 0.3, "1": 0.9}
    assert modes["silu"].ratio is None
    assert modes["silu"].by_layers == {"0": None, "1": None}


def test_between_two_readings() -> None:
    now, earlier = Sparsity(LAYERS, (30, 90), (100, 100)), Sparsity(LAYERS, (20, 50), (50, 50))

    assert now.since(earlier).by_layers == {"0": 0.2, "1": 0.8}


def test_readings_of_two_servers_are_refused() -> None:
    with pytest.raises(ValueError, match="started anew"):
        Sparsity(("0",), (1,), (9,)).since(Sparsity(("0",), (2,), (9,)))
    with pytest.raises(ValueError, match="cannot be compared"):
        Sparsity(LAYERS, (1, 1), (9, 9)).since(Sparsity(("0",), (2,), (9,)))


@pytest.mark.parametrize(
    "metrics",
    [
        "",
        "<html>",
        METRICS.replace("siluette", "other"),
        METRICS.replace('layers="1",mode="relu"} 90.0', 'layers="one",mode="relu"} 90.0'),
        METRICS.replace('elements_total{mode="relu",layers="1"}', "x{}"),
        METRICS.replace("90.0", "NaN"),
        METRICS.replace("90.0", "+Inf"),
        METRICS.replace("mode", "kind"),
    ],
)
def test_other_metrics_are_named(metrics: str) -> None:
    with pytest.raises(InvalidAnswer, match="metrics"):
        parse_sparsity(metrics)
