"""The product by `down`, by tiles and by vectors: right, and each row as if it were alone."""

from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from torch import Tensor

from engine.kernels.cpu.down import PANEL, PANEL_COLUMNS, keep_hidden, multiply_down, skip_down
from engine.kernels.cpu.formats import as_array
from engine.kernels.cpu.tiles import ROWS as TILE_ROWS
from engine.kernels.cpu.tiles import configure, release
from tests.engine.kernels.kinds import Kind, every_kind, normal

# [intermediate, hidden]; more and fewer neurons and columns than a panel has, and a multiple of one.
SHAPES = [(32, 64), (96, 96), (544, 64), (512, 32), (1536, 576), (288, 704)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
ROWS = [*range(1, 34), 256]
MOST = max(ROWS)


@njit
def call_keep(h, rows, intermediate, first, values):  # type: ignore[no-untyped-def]
    for row in range(rows):
        keep_hidden(h, row, intermediate, first, values[row])


@njit
def call_down(config, h, rows, intermediate, down, hidden, begin, end, first, last, totals, panel, out):  # type: ignore[no-untyped-def]
    if config is not None:
        configure(config)
    multiply_down(h, rows, intermediate, down, hidden, begin, end, first, last, totals, panel, out)
    if config is not None:
        release()


@njit
def call_skip(h, rows, intermediate, down, hidden, begin, end, first, last, totals, places, factors, out):  # type: ignore[no-untyped-def]
    skip_down(h, rows, intermediate, down, hidden, begin, end, first, last, totals, places, factors, out)


@dataclass(frozen=True)
class Product:
    """Hidden values of token rows, `down`, and the result of each row computed alone."""

    kind: Kind
    h: Tensor  # float32 [MOST, intermediate], for tiles of values that bfloat16 has
    down: Tensor
    alone: Tensor

    def add(
        self,
        h: Tensor,
        out: Tensor,
        first: int,
        last: int,
        *,
        skip: bool = False,
        neurons: tuple[int, int] | None = None,
    ) -> None:
        """Add to some columns of `out`, what some or all neurons give.

        The kernel's memory holds NaN before, as do rows that only fill a tile.
        """
        rows, intermediate = h.shape
        hidden, padded = self.down.shape[1], -(-rows // TILE_ROWS) * TILE_ROWS
        kept = torch.full((padded * intermediate,), torch.nan, dtype=torch.bfloat16 if self.kind.amx else torch.float32)
        call_keep(as_array(kept), rows, intermediate, 0, h.numpy())
        totals = np.full(padded * hidden, np.nan, np.float32)
        some = (*(neurons or (0, intermediate)), first, last)
        arrays = as_array(kept), rows, intermediate, as_array(self.down).reshape(-1), hidden, *some, totals
        target = out.numpy().reshape(-1)
        if skip:
            call_skip(*arrays, np.full(intermediate + 66, -1), np.full(66, np.nan, np.float32), target)
        else:
            call_down(self.kind.down_tiles(rows), *arrays, np.empty(PANEL * PANEL_COLUMNS // 2, np.uint32), target)

    def __call__(self, h: Tensor, cuts: int = 1, *, skip: bool = False) -> Tensor:
        """float32 [rows, hidden], computed in `cuts` ranges of columns."""
        out, blocks = torch.zeros(len(h), self.down.shape[1]), self.down.shape[1] // 32
        edges = [32 * (blocks * cut // cuts) for cut in range(cuts + 1)]
        for first, last in pairwise(edges):
            if first < last:
                self.add(h, out, first, last, skip=skip)
        return out


@cache
def product_of(kind: Kind, shape: tuple[int, int]) -> Product:
    h = normal(MOST, shape[0], seed=1, dtype=torch.bfloat16 if kind.amx else torch.float32).float()
    h[:, ::3] = 0
    h[1::2] *= normal(MOST // 2, shape[0], seed=3) > 1
    h[5] = 0
    bare = Product(kind, h, normal(*shape, seed=2, dtype=kind.dtype), torch.empty(0))
    return Product(kind, h, bare.down, torch.cat([bare(h[row : row + 1]) for row in range(MOST)]))


@every_kind
@every_shape
def test_equals_the_exact_product_within_rounding(shape: tuple[int, int], kind: Kind) -> None:
    case = product_of(kind, shape)
    h, down = case.h.double(), case.down.double()

    error = (case(case.h).double() - h @ down).abs()

    assert (error <= shape[0] * 2.0**-24 * (h.abs() @ down.abs())).all()


@every_kind
@every_shape
@pytest.mark.parametrize("rows", ROWS)
def test_a_row_is_bit_identical_in_any_batch(rows: int, shape: tuple[int, int], kind: Kind) -> None:
    case = product_of(kind, shape)

    assert torch.equal(case(case.h[:rows]), case.alone[:rows])
    assert torch.equal(case(case.h[MOST - rows :]), case.alone[MOST - rows :])


@every_kind
@every_shape
@pytest.mark.parametrize("cuts", [2, 3, 18])
def test_how_columns_are_cut_does_not_change_the_bits(cuts: int, shape: tuple[int, int], kind: Kind) -> None:
    case = product_of(kind, shape)

    for rows in (1, 5, 33):
        assert torch.equal(case(case.h[:rows], cuts), case.alone[:rows])


@every_kind
@pytest.mark.parametrize("rows", [1, 16, 17, 33])
def test_is_added_to_what_is_there_in_the_columns_asked_for(rows: int, kind: Kind) -> None:
    case = product_of(kind, (96, 96))
    before = normal(rows, 96, seed=4)
    out = before.clone()

    case.add(case.h[:rows], out, 32, 64)

    assert torch.equal(out[:, 32:64], before[:, 32:64] + case.alone[:rows, 32:64])
    out[:, 32:64] = before[:, 32:64]
    assert torch.equal(out, before)


@every_kind
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9, 33])
def test_some_neurons_give_what_they_give_alone(rows: int, skip: bool, kind: Kind) -> None:
    case = product_of(kind, (544, 64))
    h, begin, end = case.h[:rows], 96, 416
    part = Product(kind, h[:, begin:end].contiguous(), case.down[begin:end].contiguous(), torch.empty(0))
    out = torch.zeros(rows, 64)

    case.add(h, out, 0, 64, skip=skip, neurons=(begin, end))

    assert torch.equal(out, part(part.h))


@every_kind
@pytest.mark.parametrize("rows", [2, 17, 33])
def test_a_row_that_is_not_finite_hurts_no_other(rows: int, kind: Kind) -> None:
    case = product_of(kind, (96, 96))
    h = case.h[:rows].clone()
    h[rows // 2] = torch.inf
    others = torch.arange(rows) != rows // 2

    found = case(h)

    assert torch.equal(found[others], case.alone[:rows][others])
    assert not found[rows // 2].isfinite().any()


class TestSkippingZeros:
    """The same sums, to the last bit."""

    @every_kind
    @every_shape
    @pytest.mark.parametrize("rows", [1, 2, 16, 17, 256])
    def test_gives_what_multiplying_by_them_gives(self, rows: int, shape: tuple[int, int], kind: Kind) -> None:
        case = product_of(kind, shape)

        assert torch.equal(case(case.h[:rows], skip=True), case.alone[:rows])

    @every_kind
    @pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.99, 1.0])
    @pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
    def test_at_any_share_of_zeros_and_any_size(self, scale: float, sparsity: float, kind: Kind) -> None:
        case = product_of(kind, (544, 64))
        kept = torch.rand(20, 544, generator=torch.Generator().manual_seed(5)) >= sparsity
        h = scale * normal(20, 544, seed=4) * kept
        h *= 2.0 ** torch.randint(-20, 20, h.shape, generator=torch.Generator().manual_seed(6))  # much is rounded away

        assert torch.equal(case(h, skip=True), case(h))

    @every_kind
    @settings(deadline=None, max_examples=60)
    @given(seed=st.integers(0, 10_000), active=st.sets(st.integers(0, 95)))
    def test_whichever_neurons_are_active(self, kind: Kind, seed: int, active: set[int]) -> None:
        case = product_of(kind, (96, 96))
        h = torch.zeros(1, 96)
        for neuron in active:
            h[0, neuron] = normal(96, seed=seed)[neuron]

        assert torch.equal(case(h, skip=True), case(h))

    @every_kind
    @pytest.mark.parametrize("cuts", [2, 3])
    def test_in_ranges_of_columns(self, cuts: int, kind: Kind) -> None:
        case = product_of(kind, (96, 96))

        assert torch.equal(case(case.h[:5], cuts, skip=True), case.alone[:5])

    @every_kind
    def test_reads_no_row_that_meets_zeros_only(self, kind: Kind) -> None:
        case = product_of(kind, (544, 64))
        down = case.down.clone()
        unused = (case.h[1:4:2] == 0).all(0)
        down[unused] = torch.nan

        spoilt = replace(case, down=down)

        assert 0.3 < unused.float().mean() < 1
        assert torch.equal(spoilt(case.h[1:4:2], skip=True), case(case.h[1:4:2]))
        assert spoilt(case.h[1:4:2]).isnan().all()

    @every_kind
    def test_without_active_neurons_gives_zeros(self, kind: Kind) -> None:
        case = product_of(kind, (96, 96))

        assert torch.equal(case(torch.zeros_like(case.h[:3]), skip=True), torch.zeros(3, 96))
