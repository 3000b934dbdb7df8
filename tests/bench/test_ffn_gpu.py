"""The feed-forward benchmark of GPUs: the blocks it compares, its figures, and that it checks results without a GPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.ffn_block import Rows, Shape, TorchBlock, Weights
from bench.ffn_gpu import Case, SparseCell, main, make_parser, targets

pytest.importorskip("triton")

from bench.ffn_gpu_block import MEMORY_BYTES, TorchFusedBlock, TritonBlock, copies_for, reference
from bench.gpu import PlainRead
from engine.kernels.triton.timing import captured, median_seconds, seconds

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE, COUNT = Shape(128, 192), 3
TOLERANCE = 0.02  # of the largest output: bfloat16


@pytest.fixture(scope="module")
def weights() -> Weights:
    return Weights.random(SHAPE)


@pytest.fixture(scope="module")
def own(weights: Weights) -> Weights:
    return Weights(weights.gate.to(DEVICE), weights.up.to(DEVICE), weights.down.to(DEVICE))


class TestBlocks:
    @pytest.mark.parametrize("share", [0.0, 0.9, 1.0])
    def test_both_paths_compute_the_block_with_the_same_bits(
        self, weights: Weights, own: Weights, share: float
    ) -> None:
        x = Rows(weights, COUNT, 1).with_zeros(share).to(DEVICE, torch.bfloat16)
        expected, block = reference(own, x[-1]), TritonBlock(own, 1, COUNT)

        sparse, dense = (block.outcome(x, sparse=path) for path in (True, False))

        assert torch.equal(sparse.out, dense.out)
        assert (sparse.out - expected).abs().max() <= TOLERANCE * max(expected.abs().max().item(), 0.2)
        assert sparse.zeros == dense.zeros == pytest.approx(share, abs=0.01)

    def test_fused_torch_block_computes_what_the_plain_one_does(self, own: Weights) -> None:
        x = torch.randn(1, COUNT, SHAPE.hidden, generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.bfloat16)

        fused, plain = TorchFusedBlock(own, 1).sweep(x).float(), TorchBlock(own, 1).sweep(x).float()

        assert (fused - plain).abs().max() <= TOLERANCE * plain.abs().max()

    def test_bytes_are_those_of_the_weights_that_are_read(self, own: Weights) -> None:
        block = TritonBlock(own, 1, COUNT)
        assert block.bytes == 2 * SHAPE.weights
        assert block.bytes_read(0.0) == block.bytes
        assert block.bytes_read(1.0) == block.bytes / 3

    def test_copies_are_larger_than_a_cache(self) -> None:
        assert copies_for(Shape(4096, 11008)) == 2
        assert copies_for(SHAPE) * 2 * SHAPE.weights >= MEMORY_BYTES


class TestTiming:
    def test_plain_read_adds_every_word(self) -> None:
        tensors = [torch.ones(5001, dtype=torch.int32, device=DEVICE), torch.ones(16, dtype=torch.int32, device=DEVICE)]
        read = PlainRead(tensors[:1])
        read()

        assert read.sums.sum().item() == 5001
        assert PlainRead(tensors).bytes == 4 * (5001 + 16)

    def test_a_captured_call_is_repeated_by_each_replay(self) -> None:
        total = torch.zeros((), device=DEVICE)
        replay = captured(lambda: total.add_(1), DEVICE)
        before = total.item()

        assert seconds(replay, DEVICE) > 0
        assert total.item() == before + 2
        assert median_seconds(lambda: total.add_(1), DEVICE, 3) > 0


def case_of(routed: str, rows: int = 1) -> Case:
    cell = SparseCell(0.9, 0.9, 0.9, routed, 40.0, 0.001, True, [1.0, 1.0, 2.0])
    times = {"read": [100.0] * 3, "torch": [3.0, 2.0, 4.0], "torch_fused": [2.0, 3.0, 5.0], "dense": [2.5] * 3}
    return Case(Shape(4096, 11008), rows, "independent", 100.0, (cell,), **times)


class TestFigures:
    def test_are_taken_round_by_round_against_the_faster_side_of_torch(self) -> None:
        figures = case_of("sparse").to_json()
        (cell,) = figures["sparse"]
        assert cell["sparse_over_torch"] == {"median": 2.0, "min": 2.0, "max": 2.0}
        assert cell["sparse_bandwidth_share"] == {"median": 0.4, "min": 0.2, "max": 0.4}
        assert figures["dense_over_torch"] == {"median": 0.8, "min": 0.8, "max": 1.6}
        assert figures["torch_bandwidth_share"]["median"] == 0.5

    @pytest.mark.parametrize(("routed", "over_dense"), [("sparse", 2.5), ("dense", 1.0)])
    def test_routed_ones_are_those_of_the_path_chosen(self, routed: str, over_dense: float) -> None:
        (cell,) = case_of(routed).to_json()["sparse"]
        assert cell["routed_over_dense"]["median"] == over_dense

    def test_targets_stand_beside_what_was_found(self) -> None:
        routed, sparse = targets([case_of("dense")])
        assert (routed["wanted"], routed["found"]) == (0.98, 0.8)
        assert (sparse["wanted"], sparse["found"]) == (1.8, 2.0)
        assert len(targets([case_of("sparse", rows=8)])) == 1


class TestCommand:
    def run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        monkeypatch.setattr("bench.ffn_gpu_block.MEMORY_BYTES", 100_000)
        arguments = [
            "--shape",
            "128x192",
            "--rows",
            "1",
            "2",
            "--zeros",
            "90",
            "--rounds",
            "2",
            "--device",
            DEVICE.type,
        ]
        main([*arguments, "--out", str(tmp_path)])
        (path,) = tmp_path.glob("ffn-gpu-*.json")
        document: dict[str, Any] = json.loads(path.read_text())
        return document

    def test_writes_what_it_found_with_the_device(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        document = self.run(tmp_path, monkeypatch)

        cases = document["results"]["cases"]
        assert [(case["rows"], case["batch"]) for case in cases] == [
            (1, "independent"),
            (2, "independent"),
            (2, "correlated"),
        ]
        for case in cases:
            (cell,) = case["sparse"]
            assert cell["error"] < TOLERANCE
            assert cell["same_bits_as_dense"]
            assert cell["zeros"] == pytest.approx(0.9, abs=0.01)
            assert (cell["sparse_us"] is None) == (DEVICE.type == "cpu")
        assert cases[2]["sparse"][0]["idle"] > cases[1]["sparse"][0]["idle"]
        assert document["device"]["name"]
        assert "same" in capsys.readouterr().out

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_without_a_gpu_it_says_what_is_missing(self) -> None:
        with pytest.raises(SystemExit, match="needs a CUDA device, and PyTorch finds none"):
            main([])

    def test_the_cpu_needs_the_interpreter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        with pytest.raises(SystemExit, match="set TRITON_INTERPRET=1"):
            main(["--device", "cpu"])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--shape", "2000x8192"], "must be multiples of 64"),
            (["--zeros", "101"], "must be per cent from 0 to 100, got '101'"),
            (["--rows", "0"], "--rows must be at least 1"),
        ],
    )
    def test_impossible_options_are_refused(
        self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err

    def test_shapes_and_zeros_by_default(self) -> None:
        options = make_parser().parse_args([])
        assert [str(shape) for shape in options.shape] == ["2048x8192", "4096x11008"]
        assert options.zeros == [0.8, 0.9, 0.95, 0.99]
        assert options.rows == [1, 2, 4, 8, 16]
