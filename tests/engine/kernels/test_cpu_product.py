"""Matrix products by tiles and by vectors: right, and each row as if it were alone."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from torch import Tensor

from engine.kernels.cpu.formats import as_array
from engine.kernels.cpu.linear import TILES, multiply
from engine.kernels.cpu.product import BLOCK, product
from engine.kernels.cpu.tiles import configure, release
from tests.engine.kernels.kinds import Array, Kind, every_kind, normal

SHAPES = [(128, 64), (960, 576), (64, 1536), (100, 96), (33, 32)]  # [out, in]; widths need not be multiples of 32
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
ROWS = [*range(1, 34), 256]
MOST = max(ROWS)


@njit
def call_product(inputs, config, rows, first, last, size, weights, neuron, out, at, stride, scratch):  # type: ignore[no-untyped-def]
    if config is not None:
        configure(config)
    product(inputs, rows, first, last, size, weights, neuron, out, at, stride, scratch)
    if config is not None:
        release()


@dataclass(frozen=True)
class Product:
    """A weight with a bias, token rows, and the result of each row computed alone."""

    kind: Kind
    x: Tensor  # float32 [MOST, in]
    weight: Tensor
    bias: Tensor  # float32
    alone: Tensor

    def __call__(self, x: Tensor, *, bias: bool = True, shares: int = 1, before: Tensor | None = None) -> Tensor:
        """The kernel's product of some rows; added to `before` if there is one."""
        rows, size = x.shape
        out = torch.full((rows, len(self.weight)), torch.nan) if before is None else before.clone()
        inputs = self.kind.pack(x, self.weight)
        for share in range(shares):
            multiply(
                share,
                shares,
                inputs,
                size,
                self.kind.tiles(rows),
                as_array(self.weight).reshape(-1),
                (self.bias if bias else self.bias[:0]).numpy(),
                out.numpy(),
                np.full(TILES + rows * BLOCK, np.nan, np.float32),
                before is not None,
            )
        return out


@cache
def product_of(kind: Kind, shape: tuple[int, int]) -> Product:
    out, size = shape
    x, weight = normal(MOST, size, seed=1), normal(out, size, seed=2, dtype=kind.dtype)
    bias = normal(out, seed=3)
    bare = Product(kind, x, weight, bias, torch.empty(0))
    return Product(kind, x, weight, bias, torch.cat([bare(x[row : row + 1]) for row in range(MOST)]))


@every_kind
@every_shape
def test_equals_the_exact_product_within_rounding(shape: tuple[int, int], kind: Kind) -> None:
    case = product_of(kind, shape)
    x, weight, bias = kind.rounded(case.x), case.weight.double(), case.bias.double()

    error = (case(case.x).double() - x @ weight.T - bias).abs()

    # Sums of n products in float32 err by n * 2^-24 of their absolute sum at most.
    assert (error <= (shape[1] + 1) * 2.0**-24 * (x.abs() @ weight.abs().T + bias.abs())).all()


@every_kind
@every_shape
@pytest.mark.parametrize("rows", ROWS)
def test_a_row_is_bit_identical_in_any_batch(rows: int, shape: tuple[int, int], kind: Kind) -> None:
    case = product_of(kind, shape)

    assert torch.equal(case(case.x[:rows]), case.alone[:rows])


@every_kind
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_neither_neighbours_nor_their_order_matter(kind: Kind, data: st.DataObject) -> None:
    case = product_of(kind, SHAPES[0])
    rows = data.draw(st.lists(st.integers(0, MOST - 1), min_size=1, max_size=50))

    assert torch.equal(case(case.x[rows]), case.alone[rows])


@every_kind
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
@pytest.mark.parametrize("rows", [2, 17, 33])
def test_a_row_that_is_not_finite_hurts_no_other(rows: int, garbage: float, kind: Kind) -> None:
    case = product_of(kind, SHAPES[0])
    x = case.x[:rows].clone()
    x[rows // 2] = garbage
    others = torch.arange(rows) != rows // 2

    found = case(x)

    assert torch.equal(found[others], case.alone[:rows][others])
    assert not found[rows // 2].isfinite().any()


@every_kind
@every_shape
@pytest.mark.parametrize("shares", [2, 3, 7, 50])
def test_how_the_work_is_cut_does_not_change_the_bits(shares: int, shape: tuple[int, int], kind: Kind) -> None:
    case = product_of(kind, shape)

    for rows in (1, 5, 33):
        assert torch.equal(case(case.x[:rows], shares=shares), case.alone[:rows])


@every_kind
@every_shape
def test_without_a_bias(shape: tuple[int, int], kind: Kind) -> None:
    case = product_of(kind, shape)

    assert torch.equal(case(case.x[:5], bias=False) + case.bias, case.alone[:5])


@every_kind
@pytest.mark.parametrize("shares", [1, 3])
def test_added_to_what_is_there(shares: int, kind: Kind) -> None:
    case = product_of(kind, SHAPES[1])
    before = normal(20, SHAPES[1][0], seed=4)

    assert torch.equal(case(case.x[:20], shares=shares, before=before), before + case.alone[:20])


@every_kind
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 15, 16, 17, 32, 33, 48, 50])
def test_of_some_rows_to_any_place(rows: int, kind: Kind) -> None:
    case = product_of(kind, (128, 64))
    inputs = kind.pack(case.x[:rows], case.weight)
    weights = as_array(case.weight).reshape(-1)
    expected = case(case.x[:rows], bias=False)[:, 32:64]
    width, at = BLOCK + 9, 5

    for first in range(0, rows, 16):
        for last in sorted({min(first + count, rows) for count in (1, 3, 16, 17, 32, 50)}):
            out = torch.full((last - first + 1, width), torch.nan)
            tiles, scratch = kind.tiles(rows), np.empty(TILES, np.float32)
            flat = out.numpy().reshape(-1)
            call_product(inputs, tiles, rows, first, last, 64, weights, 32, flat, at, width, scratch)
            assert torch.equal(out[:-1, at : at + BLOCK], expected[first:last])
            out[:-1, at : at + BLOCK] = torch.nan
            assert out.isnan().all()


@every_kind
def test_no_weight_of_other_neurons_is_used(kind: Kind) -> None:
    case = product_of(kind, (128, 64))
    weight = case.weight.clone()
    weight[:64] = weight[96:] = torch.nan

    for rows in (1, 4, 16, 33):
        out = np.empty((rows, BLOCK), np.float32)
        inputs = kind.pack(case.x[:rows], weight)
        scratch: Array = np.empty(TILES, np.float32)
        flat = out.reshape(-1)
        weights = as_array(weight).reshape(-1)
        call_product(inputs, kind.tiles(rows), rows, 0, rows, 64, weights, 64, flat, 0, BLOCK, scratch)
        assert torch.equal(torch.from_numpy(out), case(case.x[:rows], bias=False)[:, 64:96])
