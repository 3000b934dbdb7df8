"""What the benchmark of decoding measures, on a tiny model, and what it makes of its figures."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bench.bandwidth import arrays_of
from bench.decode import QUESTIONS, bytes_of_step, main, make_parser, measure, resident_mib, summarise
from bench.decode_plot import plot
from engine import EngineConfig
from engine.config import Quantization
from engine.engine import Engine
from tests.engine.models.tiny import make_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny("llama", path, max_position_embeddings=1024)
    return path


@pytest.mark.parametrize("quantize", [Quantization.NONE, Quantization.INT8])
def test_bytes_of_a_step_are_all_weights_but_those_skipped(tiny: Path, quantize: Quantization) -> None:
    engine = Engine(EngineConfig(model=str(tiny), quantize=quantize, kv_cache_mib=16))
    layers = engine._runner.backend._arrays  # type: ignore[attr-defined]
    skippable = sum(array.nbytes for array in arrays_of((layers.up, layers.down)))
    whole, none = bytes_of_step(engine, 0.0), bytes_of_step(engine, 1.0)
    assert whole - none == skippable
    assert bytes_of_step(engine, 0.75) == pytest.approx(none + skippable / 4)
    if quantize is Quantization.NONE:
        # The embedding is read a row at a time; the last norm is not counted.
        assert whole >= engine.info.weight_bytes - (engine.info.vocab_size + 1) * engine.info.hidden_size * 4
    assert whole < engine.info.weight_bytes * 2


def test_one_side_measures_each_number_of_streams_and_mode(tiny: Path) -> None:
    options = make_parser().parse_args(
        ["--side", "none", "--model", str(tiny), "--streams", "1", "2", "--steps", "3", "--no-memory"]
    )
    measured = measure(options)
    assert [(run["streams"], run["mode"]) for run in measured["runs"]] == [
        (streams, mode) for streams in (1, 2) for mode in ("silu", "stochastic", "relu")
    ]
    assert all(run["tokens_per_second"] > 0 for run in measured["runs"])
    zeros = {run["mode"]: run["zeros"] for run in measured["runs"] if run["streams"] == 1}
    assert zeros["silu"] == 0 < zeros["stochastic"] < zeros["relu"] < 1
    silu, _, relu, *several = measured["runs"]
    assert relu["bytes"] <= silu["bytes"]
    assert all(run["bytes"] is None for run in several)
    assert measured["read_bytes_per_second"] > 0
    assert "resident_mib" not in measured


def test_memory_is_that_of_this_process_with_its_cache_in_use(tiny: Path) -> None:
    engine = Engine(EngineConfig(model=str(tiny), kv_cache_mib=64, max_num_seqs=64))
    before = engine.stats().generated_tokens
    resident = resident_mib(engine)
    assert engine.stats().generated_tokens - before == 32 * 128
    assert resident is None or resident > 100  # PyTorch alone takes more
    assert not engine.has_work


def test_questions_differ() -> None:
    assert len(set(QUESTIONS)) == len(QUESTIONS) == 32


def round_of(silu: float, relu: float, **more: float) -> dict[str, Any]:
    runs = [
        {"streams": streams, "mode": mode, "tokens_per_second": streams * rate, "zeros": zeros, "bytes": size}
        for streams, size in ((1, 2e8), (8, None))
        for mode, rate, zeros in (("silu", silu, 0.0), ("relu", relu, 0.8))
    ]
    return {"runs": runs, "read_bytes_per_second": 4e10, **more}


def test_summary_compares_within_a_round() -> None:
    rounds = [round_of(100, 150, resident_mib=700.0, seconds_to_ready=3.0), round_of(50, 100, seconds_to_ready=4.0)]
    (result,) = summarise({"none": rounds})
    silu, relu, silu_8, relu_8 = result["cases"]
    assert (result["quantize"], result["resident_mib"]) == ("none", 700.0)
    assert result["seconds_to_ready"] == {"median": 3.5, "min": 3.0, "max": 4.0}
    assert result["read_gb_per_s"]["median"] == 40.0
    assert silu["tokens_per_second"] == {"median": 75.0, "min": 50.0, "max": 100.0}
    assert silu["step_ms"] == {"median": 15.0, "min": 10.0, "max": 20.0}
    assert (silu["step_mb"], silu["bandwidth_share"]["max"]) == (200.0, 0.5)
    assert relu["over_silu"] == {"median": 1.75, "min": 1.5, "max": 2.0}
    assert silu_8["step_ms"] == silu["step_ms"]
    assert "bandwidth_share" not in relu_8


def test_summary_without_silu_memory_and_server() -> None:
    one = round_of(100, 150)
    one["runs"] = [run for run in one["runs"] if run["mode"] == "relu"]
    (result,) = summarise({"int8": [one]})
    assert result["resident_mib"] is None
    assert result["seconds_to_ready"] is None
    assert all("over_silu" not in case for case in result["cases"])


def test_plot_has_a_panel_for_each_number_of_streams(tmp_path: Path) -> None:
    path = tmp_path / "new" / "decode.svg"
    plot(summarise({"none": [round_of(100, 150)], "int8": [round_of(150, 200)]}), path)
    texts = {"".join(e.itertext()).strip() for e in ElementTree.parse(path).iter() if e.tag.endswith("}text")}
    assert {"1 stream", "8 streams", "not quantised", "int8", "silu", "relu"} <= texts


@pytest.mark.slow
def test_command_writes_result_and_plot(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--model",
        str(tiny),
        "--quantize",
        "none",
        "--modes",
        "silu",
        "relu",
        "--streams",
        "1",
        "--steps",
        "3",
    ]
    main([*arguments, "--rounds", "1", "--out", str(tmp_path), "--plot", str(tmp_path / "decode.svg")])
    (path,) = tmp_path.glob("decode-*.json")
    document = json.loads(path.read_text())
    assert document["settings"]["model"] == "tiny"
    assert str(tmp_path) not in path.read_text()
    (result,) = document["results"]
    assert result["seconds_to_ready"]["median"] > 0
    assert result["resident_mib"] > 100
    assert [case["mode"] for case in result["cases"]] == ["silu", "relu"]
    assert (tmp_path / "decode.svg").exists()
    assert "Decoding, tokens per second" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--streams", "33"], "--streams must be from 1 to 32"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--plot", "decode.pdf"], "must end in .svg or .png, got 'decode.pdf'"),
        (["--side", "none", "--model", "/no/such/model"], "/no/such/model"),
    ],
)
def test_impossible_options_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
