"""Matrix products whose rows do not depend on each other."""

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kernels.cpu.linear import LADDER, InvariantLinear, invariant_sizes, tile_rows

DTYPES = [torch.float32, torch.bfloat16]
MAX_ROWS = 300  # beyond the largest tile
SHAPES = [(128, 64), (960, 576), (64, 1536)]  # [out, in]
SIZES = st.lists(st.sampled_from(LADDER), min_size=1, unique=True).map(lambda sizes: tuple(sorted(sizes)))


@dataclass(frozen=True)
class Case:
    out_features: int
    in_features: int
    dtype: torch.dtype
    transposed: bool

    def __str__(self) -> str:
        layout = "transposed" if self.transposed else "plain"
        return f"{self.out_features}x{self.in_features}-{str(self.dtype).removeprefix('torch.')}-{layout}"


@dataclass(frozen=True)
class Product:
    """A product and its result for each row computed alone."""

    linear: InvariantLinear
    x: Tensor
    weight: Tensor
    bias: Tensor
    alone: Tensor


CASES = [Case(*shape, dtype, transposed) for shape in SHAPES for dtype in DTYPES for transposed in (False, True)]
all_cases = pytest.mark.parametrize("case", CASES, ids=str)


@cache
def product_of(case: Case) -> Product:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(MAX_ROWS, case.in_features, generator=generator).to(case.dtype)
    weight = torch.randn(case.out_features, case.in_features, generator=generator).to(case.dtype)
    bias = torch.randn(case.out_features, generator=generator).to(case.dtype)
    sizes = invariant_sizes(case.out_features, case.in_features, case.dtype, transposed=case.transposed)
    stored = weight.t().contiguous() if case.transposed else weight
    linear = InvariantLinear(stored, bias, transposed=case.transposed, sizes=sizes)
    return Product(linear, x, weight, bias, torch.cat([linear(x[row : row + 1]) for row in range(MAX_ROWS)]))


@all_cases
@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, MAX_ROWS), data=st.data())
def test_a_row_is_bit_identical_whatever_is_beside_it(case: Case, rows: int, data: st.DataObject) -> None:
    product = product_of(case)
    first = data.draw(st.integers(0, MAX_ROWS - rows))

    y = product.linear(product.x[first : first + rows])

    assert torch.equal(y, product.alone[first : first + rows])


@all_cases
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_the_order_of_rows_does_not_matter(case: Case, data: st.DataObject) -> None:
    product = product_of(case)
    order = data.draw(st.permutations(range(40)))

    assert torch.equal(product.linear(product.x[order]), product.alone[order])


@all_cases
def test_equals_the_exact_product_within_rounding(case: Case) -> None:
    product = product_of(case)
    x, weight, bias = product.x.double(), product.weight.double(), product.bias.double()
    exact = x @ weight.T

    error = (product.linear(product.x).double() - exact - bias).abs()

    # Sums of n products in float32 err by n * 2^-24 of their absolute sum at most. bfloat16 rounds the product, then
    # the sum with the bias.
    summing = case.in_features * 2.0**-24 * (x.abs() @ weight.abs().T)
    rounding = 2.0**-8 * (2 * exact.abs() + bias.abs()) if case.dtype is torch.bfloat16 else 2.0**-24 * bias.abs()
    assert (error <= summing + rounding).all()


@all_cases
def test_without_a_bias(case: Case) -> None:
    product = product_of(case)
    stored = product.weight.t().contiguous() if case.transposed else product.weight
    bare = InvariantLinear(stored, transposed=case.transposed, sizes=product.linear.sizes)

    assert torch.equal(bare(product.x[:5]) + product.bias, product.linear(product.x[:5]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_sizes_any_number_of_rows_is_multiplied_at_once(dtype: torch.dtype) -> None:
    product = product_of(Case(128, 64, dtype, False))
    free = InvariantLinear(product.weight, product.bias)

    for rows in (1, 3, 300):
        x = product.x[:rows]
        assert torch.equal(free(x), torch.mm(x, product.weight.t()) + product.bias)


@all_cases
def test_sizes_are_of_the_ladder_and_rise(case: Case) -> None:
    sizes = invariant_sizes(case.out_features, case.in_features, case.dtype, transposed=case.transposed)

    assert sizes
    assert {*sizes} <= {*LADDER}
    assert list(sizes) == sorted({*sizes})


@pytest.mark.parametrize("max_rows", [1, 3, 64, 65, 1000])
def test_row_counts_beyond_the_largest_batch_are_not_used(max_rows: int) -> None:
    assert max(invariant_sizes(128, 64, torch.float32, max_rows=max_rows)) <= max_rows


@settings(deadline=None)
@given(rows=st.integers(1, 1000), sizes=SIZES)
def test_tiles_cover_the_rows_and_only_the_last_is_padded(rows: int, sizes: tuple[int, ...]) -> None:
    tiles = tile_rows(rows, sizes)

    assert {*tiles} <= {*sizes}
    assert sum(tiles[:-1]) < rows <= sum(tiles)


@settings(deadline=None)
@given(size=st.sampled_from(LADDER))
def test_a_row_count_of_the_ladder_is_one_tile(size: int) -> None:
    assert tile_rows(size, LADDER) == (size,)


@pytest.mark.parametrize("sizes", [(1,), (1, 2), (4, 8), LADDER])
def test_many_rows_of_small_tiles(sizes: tuple[int, ...]) -> None:
    """An operator may allow long steps on a machine where few row counts are invariant."""
    rows = 8191

    tiles = tile_rows(rows, sizes)

    assert sum(tiles[:-1]) < rows <= sum(tiles)
