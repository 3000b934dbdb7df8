"""What the benchmark of feed-forward blocks measures: rows with the zeros asked for, and the same sums on all sides."""

import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bench.bandwidth import LOOPS, Array, arrays_of, read_seconds
from bench.ffn import FORMATS, Case, SparseCell, main, make_parser, measure, measure_costs
from bench.ffn_block import MEMORY_BYTES, OurBlock, Rows, Shape, TorchBlock, Weights, copies_for
from bench.ffn_plot import plot
from engine.kernels.cpu.formats import Format

SHAPE, COPIES, COUNT = Shape(192, 512), 3, 4
SHARES = [0.0, 0.5, 0.9, 0.99, 1.0]
# Of the largest output; the kernels round rows to bfloat16 or 8 bits, and int8 weights as well.
TOLERANCE = {"bf16": 0.01, "int8": 0.03}


@pytest.fixture(scope="module")
def weights() -> Weights:
    return Weights.random(SHAPE)


@pytest.fixture(scope="module")
def rows(weights: Weights) -> Rows:
    return Rows(weights, COUNT, COPIES)


@pytest.fixture(scope="module", params=FORMATS)
def block(request: pytest.FixtureRequest, weights: Weights) -> tuple[str, OurBlock]:
    return request.param, OurBlock(weights, FORMATS[request.param], COPIES, COUNT)


def relu_block(weights: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output and gate values of the definition, in float64."""
    x = x.double()
    gate = x @ weights.gate.double().t()
    activated = functional.silu(gate) * (gate > 0)
    return (activated * (x @ weights.up.double().t())) @ weights.down.double(), gate


class TestRows:
    @pytest.mark.parametrize("share", SHARES)
    def test_each_row_has_exactly_the_zeros_asked_for(self, weights: Weights, rows: Rows, share: float) -> None:
        _, gate = relu_block(weights, rows.with_zeros(share))
        assert ((gate <= 0).sum(-1) == round(share * SHAPE.intermediate)).all()

    def test_rows_are_independent(self, weights: Weights, rows: Rows) -> None:
        _, gate = relu_block(weights, rows.with_zeros(0.8))
        zero = (gate <= 0).flatten(0, 1).double()
        both = (zero @ zero.t()) / SHAPE.intermediate
        apart = both[~torch.eye(len(zero), dtype=torch.bool)]
        assert apart.mean().item() == pytest.approx(0.8**2, abs=0.02)

    def test_correlated_rows_share_zeros_and_have_as_many(self, weights: Weights) -> None:
        rows = Rows(weights, COUNT, COPIES, correlation=0.9)
        _, gate = relu_block(weights, rows.with_zeros(0.8))
        assert ((gate <= 0).sum(-1) == round(0.8 * SHAPE.intermediate)).all()
        assert rows.idle(0.8) > 0.6  # 0.8**4 = 0.41 for independent ones

    @pytest.mark.parametrize("share", [0.0, 0.8, 0.99])
    def test_idle_neurons_are_those_that_no_row_uses(self, weights: Weights, rows: Rows, share: float) -> None:
        _, gate = relu_block(weights, rows.with_zeros(share))
        assert rows.idle(share) == pytest.approx((gate <= 0).all(1).double().mean().item(), abs=1e-6)

    def test_values_are_bfloat16(self, rows: Rows) -> None:
        x = rows.with_zeros(0.9)
        assert torch.equal(x, x.bfloat16().float())


class TestBlocks:
    @pytest.mark.parametrize("share", SHARES)
    def test_sparse_path_computes_the_block(
        self, block: tuple[str, OurBlock], weights: Weights, rows: Rows, share: float
    ) -> None:
        name, ours = block
        x = rows.with_zeros(share)
        expected, _ = relu_block(weights, x)
        out, zeros = ours.sweep(x, sparse=True)
        assert zeros == pytest.approx(share, abs=0.005 if name == "int8" else 0.001)
        # int8 may flip a neuron whose gate is next to 0; what it adds is next to 0 as well.
        assert (out - expected).abs().max() <= TOLERANCE[name] * max(expected.abs().max().item(), 0.2)

    def test_dense_path_computes_what_torch_computes(
        self, block: tuple[str, OurBlock], weights: Weights, rows: Rows
    ) -> None:
        name, ours = block
        x = rows.with_zeros(0.5)
        out, zeros = ours.sweep(x, sparse=False, relu=False)
        expected = TorchBlock(weights, COPIES).sweep(x.bfloat16()).float()
        assert zeros == 0
        assert (out[-1] - expected).abs().max() <= TOLERANCE[name] * expected.abs().max()

    def test_relu_rows_have_their_zeros_on_both_paths(self, block: tuple[str, OurBlock], rows: Rows) -> None:
        x = rows.with_zeros(0.9)
        dense, sparse = (block[1].sweep(x, sparse=path) for path in (False, True))
        assert dense[1] == sparse[1]
        torch.testing.assert_close(dense[0], sparse[0], rtol=0, atol=0.01 * dense[0].abs().max().item())

    def test_times_are_of_one_copy(self, block: tuple[str, OurBlock], rows: Rows) -> None:
        assert block[1].seconds(rows.with_zeros(0.9), sparse=True) > 0

    def test_bytes_are_those_of_the_arrays(self, block: tuple[str, OurBlock]) -> None:
        name, ours = block
        whole = ours.bytes_read(0.0)
        assert whole * COPIES == sum(array.nbytes for array in ours.arrays)
        # Scales of int8 are 2 bytes for 64 weights.
        assert whole == SHAPE.weights * (2 if name == "bf16" else 1 + 2 / 64)
        assert ours.bytes_read(1.0) == pytest.approx(whole / 3)

    @pytest.mark.parametrize("kind", FORMATS.values())
    def test_copies_are_larger_than_a_cache(self, kind: Format) -> None:
        size = SHAPE.weights * (2 if kind is Format.FLOAT else 1)
        assert MEMORY_BYTES <= copies_for(SHAPE, kind) * size < MEMORY_BYTES + size


def test_costs_are_those_of_both_paths(weights: Weights, rows: Rows) -> None:
    costs = measure_costs(OurBlock(weights, Format.FLOAT, COPIES, COUNT), rows, 7)
    for side in (costs.dense, costs.sparse_low, costs.sparse_high):
        assert len(side) == 7
        assert len(set(side)) == 1
        assert side[0] > 0


def test_measure_gives_every_cell_in_every_round(weights: Weights) -> None:
    cases = measure(weights, "bf16", [1, 2], [0.5, 0.9], rounds=2, copies=2)
    assert [case.rows for case in cases] == [1, 2]
    for case in cases:
        assert len(case.read) == len(case.torch) == len(case.dense) == 2
        assert [cell.wanted for cell in case.sparse] == [0.5, 0.9]
        assert all(len(cell.seconds) == 2 and min(cell.seconds) > 0 for cell in case.sparse)
        assert [cell.zeros for cell in case.sparse] == pytest.approx([0.5, 0.9], abs=0.002)
    alone, together = cases
    assert alone.sparse[1].idle == pytest.approx(0.9, abs=0.002)
    assert together.sparse[1].idle == pytest.approx(0.81, abs=0.03)
    assert alone.sparse[1].bytes == pytest.approx(alone.bytes * (1 / 3 + 2 / 3 * (1 - alone.sparse[1].idle)))


def case_of(routed: str) -> Case:
    cell = SparseCell(0.9, 0.9, 0.9, routed, bytes=0.4e6, seconds=[1e-4, 1e-4])
    return Case(SHAPE, "bf16", 1, 1e6, (cell,), read=[1e10, 2e10], torch=[4e-4, 2e-4], dense=[2e-4, 2e-4])


def test_ratios_are_taken_within_a_round() -> None:
    document = case_of("sparse").to_json()
    assert document["dense_over_torch"] == {"median": 1.5, "min": 1.0, "max": 2.0}
    assert document["dense_bandwidth_share"] == {"median": 0.375, "min": 0.25, "max": 0.5}
    (cell,) = document["sparse"]
    assert cell["sparse_over_torch"] == {"median": 3.0, "min": 2.0, "max": 4.0}
    assert cell["sparse_bandwidth_share"] == {"median": 0.3, "min": 0.2, "max": 0.4}


@pytest.mark.parametrize(("routed", "over_dense"), [("sparse", 2.0), ("dense", 1.0)])
def test_routed_figures_are_those_of_the_path_chosen(routed: str, over_dense: float) -> None:
    (cell,) = case_of(routed).to_json()["sparse"]
    assert cell["routed"] == routed
    assert cell["routed_over_dense"]["median"] == over_dense
    assert cell["sparse_over_dense"]["median"] == 2.0


def test_plot_has_a_panel_for_each_format_and_a_line_for_each_number_of_rows(tmp_path: Path) -> None:
    one = case_of("sparse").to_json()
    path = tmp_path / "new" / "ffn.svg"
    plot([one, {**one, "rows": 8}, {**one, "format": "int8"}], path)
    texts = {"".join(e.itertext()).strip() for e in ElementTree.parse(path).iter() if e.tag.endswith("}text")}
    assert {"192x512, bf16", "192x512, int8", "1 row", "8 rows"} <= texts


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("size", [0, 7, 64, 1000, 5003])
def test_plain_read_adds_every_word(loop: Callable[[Array, int], int], size: int) -> None:
    words = np.arange(size, dtype=np.int64)
    assert [loop(words, threads) for threads in (1, 2, 3)] == [words.sum()] * 3


def test_plain_read_counts_every_byte() -> None:
    arrays = [np.ones(1001, np.int64), np.ones((3, 8), np.uint16), np.ones(16, np.int8)]
    size, seconds = read_seconds(arrays)
    assert size == sum(array.nbytes for array in arrays)
    assert seconds > 0
    assert list(arrays_of((arrays[0], (arrays[1], arrays[2])))) == arrays


class TestCommand:
    def test_writes_what_it_measured(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("bench.ffn_block.MEMORY_BYTES", 2_000_000)
        arguments = ["--shape", "128x256", "--rows", "1", "--zeros", "90", "--rounds", "1", "--out", str(tmp_path)]
        main(arguments)
        (path,) = tmp_path.glob("ffn-*.json")
        document = json.loads(path.read_text())
        assert [(case["shape"], case["format"]) for case in document["results"]] == [
            ("128x256", "bf16"),
            ("128x256", "int8"),
        ]
        assert "times as fast as torch" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--shape", "2048"], "must be HIDDENxINTERMEDIATE"),
            (["--shape", "2000x8192"], "must be multiples of 64"),
            (["--zeros", "101"], "must be per cent from 0 to 100, got '101'"),
            (["--rows", "0"], "--rows must be at least 1"),
            (["--plot", "ffn.pdf"], "must end in .svg or .png, got 'ffn.pdf'"),
            (["--shape", "576x1536", "--plot"], "--plot draws 2048x8192, which --shape leaves out"),
        ],
    )
    def test_impossible_options_are_refused(
        self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err

    def test_shapes_are_those_of_real_models_by_default(self) -> None:
        shapes = [str(shape) for shape in make_parser().parse_args([]).shape]
        assert shapes == ["576x1536", "2048x8192", "3072x8192", "4096x11008"]
