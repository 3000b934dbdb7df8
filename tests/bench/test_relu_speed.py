"""What the benchmark of RELU measures, on a tiny model, and what it makes of its figures."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.relu_feed_forward import BlockTimes, Recorder, RowsResult, dense_silu, measure, recording, split
from bench.relu_speed import (
    MODES,
    BenchmarkError,
    DecodeRun,
    StreamsResult,
    decode,
    decoding,
    main,
    run_end_to_end,
    run_feed_forward,
)
from bench.relu_speed_plot import plot
from engine import Activation, ActivationMode, DType, EngineConfig, SamplingParams
from engine.activation import NEVER_SILU
from engine.engine import Engine
from evaluation.sparsity import zero_shares
from tests.engine.models.tiny import make_tiny

NUM_LAYERS, HIDDEN, INTERMEDIATE = 3, 64, 128
SILU, RELU = MODES
PROMPTS = [[10 + 7 * place, 20, 30 + place] for place in range(8)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny("llama", path)
    return path


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Engine:
    """In float32, where the kernels and those that record agree to the last digits."""
    config = EngineConfig(model=str(tiny), dtype=DType.FLOAT32, allow_untuned_activations=True, kv_cache_mib=4)
    return Engine(config)


@pytest.fixture(scope="module")
def recorder(engine: Engine) -> Recorder:
    """Two steps of four streams in RELU mode."""
    with decoding(engine, PROMPTS[:4], RELU), recording(engine) as recorder:
        engine.step()
        engine.step()
    return recorder


def spent(engine: Engine, mode: ActivationMode) -> int:
    return sum(engine.stats().ffn_elements[mode])


class TestDecoding:
    def test_all_streams_have_their_first_token_when_it_begins(self, engine: Engine) -> None:
        before = engine.stats()
        with decoding(engine, PROMPTS, RELU):
            begun = engine.stats()
            engine.step()
            assert engine.stats().generated_tokens == begun.generated_tokens + len(PROMPTS)
        assert begun.running == len(PROMPTS)
        assert begun.generated_tokens >= before.generated_tokens + len(PROMPTS)
        assert not engine.has_work

    @pytest.mark.parametrize("mode", MODES)
    def test_only_timed_steps_count(self, engine: Engine, mode: ActivationMode) -> None:
        before = spent(engine, mode)
        run = decode(engine, PROMPTS[:2], mode, steps=5)
        in_prompts = 2 * len(PROMPTS[0]) * NUM_LAYERS * INTERMEDIATE
        assert spent(engine, mode) - before == in_prompts + 5 * 2 * NUM_LAYERS * INTERMEDIATE
        assert run.tokens_per_second > 0
        assert len(run.zeros) == NUM_LAYERS

    def test_zeros_are_those_of_the_mode(self, engine: Engine) -> None:
        assert all(0.1 < share < 0.9 for share in decode(engine, PROMPTS[:2], RELU, steps=5).zeros)
        assert decode(engine, PROMPTS[:2], SILU, steps=5).zeros == [0.0] * NUM_LAYERS

    def test_end_of_the_context_is_an_error(self, engine: Engine) -> None:
        with pytest.raises(BenchmarkError, match=r"2 streams gave 50\d tokens in 300 steps.*\(256 tokens\)"):
            decode(engine, PROMPTS[:2], SILU, steps=300)
        assert not engine.has_work

    def test_each_round_measures_both_modes_at_each_number_of_streams(self, engine: Engine) -> None:
        results = run_end_to_end(engine, PROMPTS, [1, 3], steps=2, rounds=2)
        assert [result.streams for result in results] == [1, 3]
        assert all(len(runs) == 2 for result in results for runs in (result.silu, result.relu))

    def test_speedup_is_taken_within_a_round(self) -> None:
        silu = (DecodeRun(10.0, [0.0, 0.0]), DecodeRun(40.0, [0.0, 0.0]))
        relu = (DecodeRun(20.0, [0.5, 0.9]), DecodeRun(20.0, [0.7, 0.9]))
        document = StreamsResult(1, silu, relu).to_json()
        assert document["silu_tokens_per_second"] == {"median": 25.0, "min": 10.0, "max": 40.0}
        assert document["relu_speedup"] == {"median": 1.25, "min": 0.5, "max": 2.0}
        assert document["zeros_by_layer"] == [0.6, 0.9]
        assert document["zeros"] == 0.75


class TestRecording:
    def test_keeps_the_input_of_every_block(self, recorder: Recorder) -> None:
        assert len(recorder.batches) == 2
        for batch in recorder.batches:
            assert [x.shape for x in batch.hidden] == [(4, HIDDEN)] * NUM_LAYERS
            assert (batch.step.activations.threshold == NEVER_SILU).all()

    def test_changes_no_token(self, engine: Engine) -> None:
        def generate() -> list[int]:
            engine.add(engine.check("x", PROMPTS[0], SamplingParams(temperature=0.0, max_tokens=8), Activation(RELU)))
            return [token for _ in range(8) for output in engine.step() for token in output.samples[0].token_ids]

        alone = generate()
        with recording(engine) as recorder:
            assert generate() == alone
        assert len(recorder.batches) == 8
        assert generate() == alone
        assert len(recorder.batches) == 8

    def test_the_engine_goes_on_with_its_own_kernels(self, engine: Engine) -> None:
        backend = engine._runner.backend
        with contextlib.suppress(ZeroDivisionError), recording(engine) as recorder:
            assert engine._runner.backend is recorder
            raise ZeroDivisionError
        assert engine._runner.backend is backend

    def test_zeros_of_recorded_steps_are_counted(self, engine: Engine) -> None:
        with decoding(engine, PROMPTS[:4], RELU), recording(engine):
            before = spent(engine, RELU)
            engine.step()
            assert spent(engine, RELU) - before == 4 * INTERMEDIATE * NUM_LAYERS

    def test_blocks_alone_give_what_they_gave_in_the_step(self, engine: Engine) -> None:
        class Outputs(Recorder):
            def _feed_forward(self, layer, weights, x, step):  # type: ignore[no-untyped-def]
                outputs.append(super()._feed_forward(layer, weights, x, step))
                return outputs[-1]

        outputs: list[torch.Tensor] = []
        backend = engine._runner.backend
        with decoding(engine, PROMPTS[:4], RELU):
            engine._runner.backend = recorder = Outputs(backend)
            engine.step()
            engine._runner.backend = backend
        (batch,) = recorder.batches
        with torch.inference_mode():
            for layer, expected in enumerate(outputs):
                together = backend.feed_forward(layer, batch.hidden[layer], batch.step)
                torch.testing.assert_close(together, expected, rtol=0, atol=1e-5)
                for rows in (1, 2, 4):
                    parts = [backend.feed_forward(layer, p.hidden[layer], p.step) for p in split(batch, rows)]
                    assert torch.equal(torch.cat(parts), together)

    @pytest.mark.parametrize(("rows", "batches"), [(1, 4), (2, 2), (3, 1), (4, 1), (5, 0)])
    def test_batches_are_full(self, recorder: Recorder, rows: int, batches: int) -> None:
        parts = list(split(recorder.batches[0], rows))
        assert len(parts) == batches
        assert all(len(part.step.positions) == rows and part.step.skip_zeros for part in parts)


class TestBlocks:
    def test_silu_side_is_the_dense_path_of_silu(self, recorder: Recorder) -> None:
        batch = dense_silu(recorder.batches[0])
        weights, x = recorder.weights.layers[1], batch.hidden[1]
        gate = x @ weights.gate.t()
        expected = (torch.nn.functional.silu(gate) * (x @ weights.up.t())) @ weights.down
        with torch.inference_mode():
            out = recorder.backend.feed_forward(1, x, batch.step)
        assert not batch.step.skip_zeros
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)

    def test_zeros_are_those_that_the_engine_counts(self, engine: Engine) -> None:
        with decoding(engine, PROMPTS[:4], RELU), recording(engine) as recorder:
            before = engine.stats()
            engine.step()
            after = engine.stats()
        counted = zero_shares(before, after, RELU)
        batches = [part for batch in recorder.batches for part in split(batch, 2)]
        measured = [block.zeros for block in measure(recorder.backend, batches, rounds=1)]
        assert measured == pytest.approx(list(counted), abs=1e-6)

    def test_zeros_of_one_row_are_its_idle_neurons(self, recorder: Recorder) -> None:
        batches = [part for batch in recorder.batches for part in split(batch, 1)]
        for block in measure(recorder.backend, batches, rounds=2):
            assert block.idle == pytest.approx(block.zeros)
            assert 0.2 < block.idle < 0.8
            assert len(block.silu_us) == len(block.relu_us) == 2
            assert min(*block.silu_us, *block.relu_us) > 0

    def test_more_rows_leave_fewer_neurons_idle_and_the_same_zeros(self, engine: Engine) -> None:
        one, four = run_feed_forward(engine, PROMPTS, [1, 4], steps=2, rounds=1)
        for alone, together in zip(one.layers, four.layers, strict=True):
            assert together.idle < alone.idle
            assert together.zeros == pytest.approx(alone.zeros)

    @pytest.mark.parametrize(("idle", "bound"), [(0.0, 1.0), (0.5, 1.5), (1.0, 3.0)])
    def test_bound_is_bytes_of_weights(self, idle: float, bound: float) -> None:
        assert BlockTimes(idle, idle, (1.0,), (1.0,)).bound == pytest.approx(bound)

    def test_all_layers_together_are_the_sum_of_their_times(self) -> None:
        blocks = (BlockTimes(0.5, 0.5, (10.0, 20.0), (5.0, 5.0)), BlockTimes(0.7, 0.6, (10.0, 40.0), (15.0, 10.0)))
        document = RowsResult(1, blocks).to_json()
        assert document["all_layers"]["silu_us"] == {"median": 40.0, "min": 20.0, "max": 60.0}
        assert document["all_layers"]["relu_speedup"] == {"median": 2.5, "min": 1.0, "max": 4.0}
        assert document["all_layers"]["zeros"] == 0.6
        assert [layer["relu_speedup"]["max"] for layer in document["layers"]] == [4.0, 4.0]


class TestCommand:
    ARGUMENTS = ("--steps", "2", "--recorded-steps", "1", "--rounds", "1", "--streams", "1", "2", "--rows", "1", "2")

    def test_writes_result_tables_and_plot(
        self, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        tuned, picture = tmp_path / "tuned", tmp_path / "new" / "speed.svg"
        shutil.copytree(tiny, tuned)
        weights = load_file(tuned / "model.safetensors")
        save_file(weights, tuned / "model.safetensors", metadata={"siluette.modes": "silu,relu"})
        main(["--model", str(tuned), *self.ARGUMENTS, "--out", str(tmp_path), "--plot", str(picture)])
        (path,) = tmp_path.glob("relu-speed-*.json")
        document = json.loads(path.read_text())
        assert (document["settings"]["model"], document["settings"]["tuned"]) == ("tuned", True)
        assert str(tmp_path) not in path.read_text()
        assert [case["streams"] for case in document["results"]["end_to_end"]] == [1, 2]
        assert [case["rows"] for case in document["results"]["feed_forward"]] == [1, 2]
        assert all(len(case["layers"]) == NUM_LAYERS for case in document["results"]["feed_forward"])
        printed = capsys.readouterr().out
        assert "Feed-forward block, rows at once: 2" in printed
        assert "layer" in texts(picture)

    def test_untuned_model_is_measured_if_allowed_only(
        self, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = ["--model", str(tiny), *self.ARGUMENTS, "--out", str(tmp_path)]
        with pytest.raises(SystemExit):
            main(arguments)
        assert "tiny is not tuned for RELU; --allow-untuned measures it all the same" in capsys.readouterr().err
        main([*arguments, "--allow-untuned"])
        (path,) = tmp_path.glob("relu-speed-*.json")
        assert json.loads(path.read_text())["settings"]["tuned"] is False

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--streams", "0"], "--streams must be from 1 to 16"),
            (["--rows", "17"], "--rows must be from 1 to 16"),
            (["--recorded-steps", "0"], "--recorded-steps must be at least 1"),
            (["--plot", "speed.pdf"], "must end in .svg or .png, got 'speed.pdf'"),
            (["--model", "/no/such/model"], "/no/such/model"),
        ],
    )
    def test_impossible_options_are_refused(
        self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err


def texts(path: Path) -> list[str]:
    elements: Iterator[ElementTree.Element] = ElementTree.parse(path).iter()
    return ["".join(element.itertext()).strip() for element in elements if element.tag.endswith("}text")]


def test_plot_names_shares_and_speed_of_each_number_of_rows(tmp_path: Path) -> None:
    layers = (BlockTimes(0.8, 0.8, (20.0,), (10.0,)), BlockTimes(0.9, 0.9, (20.0,), (10.0,)))
    eight = tuple(BlockTimes(block.zeros, 0.3, (20.0,), (16.0,)) for block in layers)
    plot([RowsResult(1, layers), RowsResult(8, eight)], tmp_path / "speed.svg")
    written = texts(tmp_path / "speed.svg")
    assert {"zeros (mean 85.0%)", "idle, 8 rows at once (mean 30.0%)"} <= set(written)
    assert {"1 row at once (all layers 2.00x)", "8 rows at once (all layers 1.25x)"} <= set(written)
    plot([RowsResult(1, layers)], tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
