"""The benchmark of decoding on a GPU: its models, its arithmetic, its report, and a run in Triton's interpreter."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.decode_gpu import Case, Measured, cases_of, main, summarise, verdicts
from bench.decode_gpu_model import (
    SHAPES,
    decoding_plan,
    llama,
    num_parameters,
    random_weights,
    start_sequences,
    step_bytes,
)
from engine.activation import Activation, ActivationMode
from engine.config import FfnPath
from engine.kernels.reference import ReferenceBackend
from engine.kv_cache import BLOCK_SIZE, KVCache
from engine.models.weights import tensors_of
from tests.engine.steps import Chunk, step_inputs

CPU = torch.device("cpu")
SILU, RELU = ActivationMode.SILU, ActivationMode.RELU


@pytest.mark.parametrize(("name", "billions"), [("llama-1b", 1.236), ("llama-7b", 6.738)])
def test_shapes_are_those_of_the_models(name: str, billions: float) -> None:
    assert num_parameters(SHAPES[name]) / 1e9 == pytest.approx(billions, abs=1e-3)


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_as_they_are_made(tied: bool) -> None:
    config = llama(2, 64, 192, 4, 2, 320, tied=tied)

    weights = random_weights(config, 0.9, torch.float32, CPU)

    assert sum(tensor.numel() for tensor in tensors_of(weights)) == num_parameters(config)
    assert (weights.lm_head is weights.embedding) == tied


@pytest.mark.parametrize("zeros", [0.5, 0.9])
def test_random_weights_have_the_wanted_zeros_in_every_layer(zeros: float) -> None:
    config = llama(6, 256, 768, 4, 2, 320, tied=True)
    weights = random_weights(config, zeros, torch.float32, CPU)
    backend = ReferenceBackend(config, weights, KVCache.allocate(config, 4, torch.float32))

    with torch.inference_mode():
        backend.forward(step_inputs([Chunk(range(20, 60), 0, [0, 1, 2], Activation("relu"))]))

    counted, elements = backend.sparsity.by_mode()
    for layer in range(6):
        assert counted[RELU][layer] / elements[RELU][layer] == pytest.approx(zeros, abs=0.03)


def test_bytes_of_a_step_are_the_weights_that_it_reads_and_the_cache() -> None:
    config = SHAPES["llama-7b"]
    embedding = config.vocab_size * config.hidden_size

    alone = step_bytes(config, 1, 0, itemsize=2)

    assert alone == 2 * (num_parameters(config) - embedding)
    assert step_bytes(config, 8, 100, itemsize=2) - alone == 8 * 100 * 2 * 32 * 4096 * 2
    assert alone - step_bytes(config, 1, 0, 2, idle=0.9) == pytest.approx(0.9 * 2 * 2 * 32 * 4096 * 11_008, rel=1e-6)
    tied = SHAPES["llama-1b"]
    assert step_bytes(tied, 1, 0, itemsize=1) == num_parameters(tied)


def test_a_sequence_is_the_same_in_every_batch() -> None:
    config = SHAPES["tiny"]
    one, many = (start_sequences(config, batch, 40, 9, Activation("stochastic", p=0.5)) for batch in (1, 3))

    assert one[0].token_ids == many[0].token_ids
    assert one[0].block_ids == many[0].block_ids == [0, 1, 2, 3]
    assert one[0].activation_key == many[0].activation_key
    assert not set(many[1].block_ids) & set(many[2].block_ids)
    assert len(one[0].block_ids) * BLOCK_SIZE >= 49
    (item, *_) = decoding_plan(many).scheduled
    assert (item.start, item.count, item.samples) == (39, 1, True)


def test_relu_runs_routed_and_by_either_path() -> None:
    cases = cases_of([1, 8], [SILU, RELU])

    assert [(case.batch, case.mode, case.path) for case in cases[:4]] == [
        (1, SILU, FfnPath.AUTO),
        (1, RELU, FfnPath.AUTO),
        (1, RELU, FfnPath.SPARSE),
        (1, RELU, FfnPath.DENSE),
    ]
    assert len(cases) == 8


def measured() -> Measured:
    """A GPU that reads 1 TB/s and decodes the 7B shape at 80 % of that."""
    config = SHAPES["llama-7b"]
    seconds = step_bytes(config, 1, 512, 2) / 1e12 / 0.8
    silu = Case(1, SILU, FfnPath.AUTO, 0.0, None, [5, 6], [seconds, seconds])
    relu = Case(1, RELU, FfnPath.AUTO, 0.9, "sparse", [7], [seconds / 1.5] * 2)
    batch = Case(8, RELU, FfnPath.SPARSE, 0.9, "sparse", [8], [seconds] * 2)
    return Measured("llama-7b", 2, 512, [silu, relu, batch], [1e12, 1e12])


def test_the_summary_has_speeds_and_shares_of_the_bound() -> None:
    silu, relu, batch = summarise(measured())

    assert silu["bandwidth_share"]["median"] == 0.8
    assert silu["path"] is None
    assert relu["over_silu"]["median"] == 1.5
    # 90 % of two of a layer's three matrices are not read.
    assert relu["bandwidth_share"]["median"] == pytest.approx(0.8 * 1.5 * 0.62, abs=0.03)
    assert relu["same_tokens_as_in_the_smallest_batch"]
    assert batch["bandwidth_share"] is None  # what no row of a batch needs is not counted
    assert batch["over_silu"] is None
    assert not batch["same_tokens_as_in_the_smallest_batch"]


def test_verdicts_compare_with_what_the_project_wants() -> None:
    assert verdicts(summarise(measured())) == [
        "llama-7b, SILU, share of the bandwidth bound: 0.80, wanted 0.75: met",
        "llama-7b, RELU over SILU: 1.50, wanted 1.4: met",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([])
    assert "device 'cuda' needs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batches", "0"], "--batches must be at least 1"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--zeros", "1"], "--zeros must be between 0 and 1"),
        (["--p", "2"], "--p must be in"),
    ],
)
def test_bad_options_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton does not interpret where there is a GPU")
def test_a_run_in_the_interpreter_checks_tokens_and_leaves_times_out(tmp_path: Path) -> None:
    options = ["--batches", "1", "2", "--modes", "relu", "--context", "17", "--steps", "1", "--rounds", "1"]

    main(["--device", "cpu", *options, "--out", str(tmp_path)])

    (file,) = tmp_path.glob("decode-gpu-*.json")
    document: dict[str, Any] = json.loads(file.read_text())
    assert document["settings"]["dtype"] == "float32"
    assert document["device"]["name"]
    assert [(case["batch"], case["path"]) for case in document["results"]] == [
        (batch, path) for batch in (1, 2) for path in ("auto", "sparse", "dense")
    ]
    for case in document["results"]:
        assert case["same_tokens_as_in_the_smallest_batch"]
        assert 0.8 < case["zeros"] < 1
        assert case["tokens_per_second"] is case["step_ms"] is case["bandwidth_share"] is None
