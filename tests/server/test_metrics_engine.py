"""The engine's counts as metrics."""

from pathlib import Path

import pytest

from engine import ActivationMode, AsyncEngine, FfnPath, SamplingParams
from engine.activation import Activation
from server.metrics_engine import MAX_LAYER_GROUPS, EngineCollector, layer_groups
from tests.server.conftest import tiny_config


class TestLayerGroups:
    @pytest.mark.parametrize("layers", [1, 2, 15, 16, 17, 30, 32, 80, 126])
    def test_hold_each_layer_once_and_in_order(self, layers: int) -> None:
        groups = layer_groups(layers)

        assert [layer for group in groups.values() for layer in group] == list(range(layers))
        assert len(groups) <= MAX_LAYER_GROUPS
        assert list(groups) == sorted(groups)

    def test_are_named_by_their_ends(self) -> None:
        assert list(layer_groups(30))[:2] == ["00-01", "02-03"]
        assert list(layer_groups(33))[-1] == "30-32"
        assert list(layer_groups(12))[-1] == "11"


def values_of(engine: AsyncEngine) -> dict[tuple[str, ...], float]:
    """By name and label values."""
    families = EngineCollector(engine).collect()
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


async def generate(engine: AsyncEngine, mode: ActivationMode) -> dict[tuple[str, ...], float]:
    """The counts of one request of one mode."""
    before = values_of(engine)
    sampling = SamplingParams(max_tokens=8, ignore_eos=True, seed=1)
    async for _ in engine.generate([1, 2, 3], sampling, Activation(mode)):
        pass
    after = values_of(engine)
    return {name: value - before.get(name, 0.0) for name, value in after.items()}


@pytest.mark.parametrize("mode", ActivationMode)
async def test_dense_steps_skip_nothing(tiny_model: Path, mode: ActivationMode) -> None:
    engine = AsyncEngine(tiny_config(tiny_model, ffn_path=FfnPath.DENSE))
    engine.start()
    counts = await generate(engine, mode)
    steps, info = counts["siluette_engine_steps_total",], engine.info
    engine.shutdown()

    assert counts["siluette_ffn_neurons_total", "skipped"] == 0
    assert counts["siluette_ffn_neurons_total", "read"] == steps * info.num_layers * info.intermediate_size
    rows = 3 + 7  # the last token is not computed
    flops = 6 * info.hidden_size * info.intermediate_size * info.num_layers * rows
    assert counts["siluette_ffn_flops_total", mode, "computed"] == flops
    assert counts["siluette_ffn_flops_total", mode, "skipped"] == 0
    assert counts["siluette_weight_bytes_read_total",] == pytest.approx(steps * info.weight_bytes, rel=0.3)


async def test_relu_steps_are_spared_what_is_zero(tiny_model: Path) -> None:
    engine = AsyncEngine(tiny_config(tiny_model, ffn_path=FfnPath.SPARSE))
    engine.start()
    sparse = await generate(engine, ActivationMode.RELU)
    dense = await generate(engine, ActivationMode.SILU)
    engine.shutdown()

    skipped, read = (sparse["siluette_ffn_neurons_total", outcome] for outcome in ("skipped", "read"))
    assert 0.1 < skipped / (skipped + read) < 0.8  # a random model: half of a single row's, less of a prompt's
    spared = dense["siluette_weight_bytes_read_total",] - sparse["siluette_weight_bytes_read_total",]
    assert spared == pytest.approx(skipped * 2 * 4 * engine.info.hidden_size)  # float32 rows of `up` and `down`
    flops, left = (sparse["siluette_ffn_flops_total", "relu", outcome] for outcome in ("skipped", "computed"))
    assert 0.1 < flops / (flops + left) < 2 / 3  # the gate is always computed
    assert sparse["siluette_ffn_rows_total", "sparse"] == 3 + 7
