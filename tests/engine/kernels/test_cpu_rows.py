"""The vector loops over rows of weights, and the shuffles that feed the tiles."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from numba import njit
from torch import Tensor

from engine.kernels.cpu.formats import as_array
from engine.kernels.cpu.rows import (
    FETCHED,
    add_in_place_order,
    add_listed_pairs,
    add_listed_rows,
    add_row,
    add_rows_4,
    copy64,
    dots_in_order,
    interleave4,
    interleave32,
    make_dots,
    place_of,
    prefetch,
    transpose16,
)
from tests.engine.kernels.kinds import Array, normal, ordered

DTYPES = [torch.float32, torch.bfloat16]
SIZES = [32, 64, 96, 576]
BASE = 5  # where the weights begin

# Intrinsics can be called from compiled code only.


@njit
def places_of(weights, out):  # type: ignore[no-untyped-def]
    for k in range(out.size):
        out[k] = place_of(k, weights)


@njit
def call_transpose16(source, at, out, out_at, stride):  # type: ignore[no-untyped-def]
    transpose16(source, at, out, out_at, stride)


@njit
def call_interleave32(out, first_at, second_at, weights, even, odd):  # type: ignore[no-untyped-def]
    interleave32(out, first_at, second_at, weights, even, odd)


@njit
def call_interleave4(out, at, distance, weights, first, stride):  # type: ignore[no-untyped-def]
    interleave4(out, at, distance, weights, first, stride)


@njit
def call_copy64(source, source_at, out, out_at, size):  # type: ignore[no-untyped-def]
    copy64(source, source_at, out, out_at, size)


@njit
def call_add_rows_4(out, out_at, factors, factors_at, weights, base, places, places_at, stride, size):  # type: ignore[no-untyped-def]
    add_rows_4(out, out_at, factors, factors_at, weights, base, places, places_at, stride, size)


@njit
def call_add_listed_rows(totals, at, factors, places, split, count, weights, base, stride, size):  # type: ignore[no-untyped-def]
    add_listed_rows(totals, at, factors, places, split, count, weights, base, stride, size)


@njit
def call_add_listed_pairs(totals, at, factors, places, split, count, weights, base, stride, size):  # type: ignore[no-untyped-def]
    add_listed_pairs(totals, at, factors, places, split, count, weights, base, stride, size)


@njit
def call_add_row(out, out_at, factors, factor_at, weights, at, size):  # type: ignore[no-untyped-def]
    add_row(out, out_at, factors, factor_at, weights, at, size)


@njit
def call_add_in_place_order(out, at, totals, totals_at, weights):  # type: ignore[no-untyped-def]
    add_in_place_order(out, at, totals, totals_at, weights)


@njit
def call_dots_in_order(vectors, neurons, out, at, stride, x, x_at, x_stride, weights, base, places, places_at, size):  # type: ignore[no-untyped-def]
    dots_in_order(vectors, neurons, out, at, stride, x, x_at, x_stride, weights, base, places, places_at, size)


@njit
def call_prefetch(array, at):  # type: ignore[no-untyped-def]
    prefetch(array, at)


def compiled_dots(dots: Any) -> Callable[..., None]:
    @njit
    def call(out, out_at, out_stride, x, x_at, x_stride, weights, base, places, places_at, size):  # type: ignore[no-untyped-def]
        dots(out, out_at, out_stride, x, x_at, x_stride, weights, base, places, places_at, size)

    return call


# Rows of weights and vectors that each takes at once: in the order of memory, and from a cache.
DOTS = {(1, vectors): compiled_dots(make_dots(1, vectors, fetch=True)) for vectors in (1, 2, 6)} | {
    shape: compiled_dots(make_dots(*shape, fetch=False)) for shape in [(4, 1), (4, 4), (2, 5)]
}


def small_integers(*shape: int, seed: int) -> Tensor:
    """Values whose products and sums are exact in float32, in any order, and which bfloat16 can hold."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


def fenced(values: Tensor, before: int, dtype: torch.dtype = torch.float32) -> Array:
    """The values, flat, between others that must not be used."""
    fence = torch.full((before,), torch.nan)
    return as_array(torch.cat((fence, values.flatten(), fence, fence)).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_places_are_the_order_of_vectors_beside_rows_of_weights(dtype: torch.dtype) -> None:
    places, columns = np.empty(96, np.int64), torch.arange(96.0)

    places_of(as_array(torch.empty(0, dtype=dtype)), places)

    assert torch.equal(ordered(columns, dtype)[torch.from_numpy(places)], columns)


def dots_of(count: tuple[int, int], x: Tensor, weights: Tensor, places: list[int]) -> Tensor:
    """Products of all vectors [vectors, size] with the rows at `places`, each [size]; strides wider than the data."""
    vectors, size = x.shape
    dtype = weights.dtype
    wide = torch.full((vectors, size + 7), torch.nan)
    wide[:, :size] = ordered(x, dtype)
    out = torch.full((vectors, len(places) + 2), torch.nan)
    DOTS[count](
        out.numpy().reshape(-1),
        1,
        len(places) + 2,
        fenced(wide, 3),
        3,
        size + 7,
        fenced(weights.float(), BASE, dtype),
        BASE,
        np.array([-1, *places, *[0] * FETCHED]),
        1,
        size,
    )
    assert out[:, 0].isnan().all()
    assert out[:, -1].isnan().all()
    return out[:, 1:-1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", DOTS)
def test_dots_of_small_integers_are_exact(count: tuple[int, int], size: int, dtype: torch.dtype) -> None:
    rows, vectors = count
    x, weights = small_integers(vectors, size, seed=1), small_integers(12, size, seed=2).to(dtype)
    places = [7, 0, 11, 3, 4, 8, 1, 2][:rows]

    assert torch.equal(dots_of(count, x, weights, places), x @ weights[places].float().T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_dots_have_the_same_bits_however_many_are_computed_together(size: int, dtype: torch.dtype) -> None:
    x, weights = normal(60, size, seed=1), normal(8, size, seed=2, dtype=dtype)

    def all_by(rows: int, vectors: int) -> Tensor:
        return torch.cat(
            [
                torch.cat(
                    [
                        dots_of((rows, vectors), x[v : v + vectors], weights, list(range(n, n + rows)))
                        for n in range(0, 8, rows)
                    ],
                    dim=1,
                )
                for v in range(0, 60, vectors)
            ]
        )

    first, *others = (all_by(*shape) for shape in DOTS)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vectors", range(1, 7))
def test_dots_in_order_are_those_of_one_vector_and_one_row(vectors: int, dtype: torch.dtype) -> None:
    x, weights = normal(vectors, 96, seed=1), normal(12, 96, seed=2, dtype=dtype)
    places = [7, 0, 11, 3, 4]
    out = torch.full((vectors, 9), torch.nan)

    call_dots_in_order(
        vectors,
        len(places),
        out.numpy().reshape(-1),
        2,
        9,
        fenced(ordered(x, dtype), 3),
        3,
        96,
        fenced(weights.float(), BASE, dtype),
        BASE,
        np.array([-1, *places, *[0] * FETCHED]),
        1,
        96,
    )

    expected = [[dots_of((1, 1), row[None], weights, [place])[0, 0] for place in places] for row in x]
    assert torch.equal(out[:, 2:7], torch.tensor(expected))
    assert out[:, :2].isnan().all()
    assert out[:, 7:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_added_in_the_order_of_columns(dtype: torch.dtype) -> None:
    before, sums = normal(32, seed=1), normal(32, seed=2)
    out = fenced(before, 3)

    call_add_in_place_order(out, 3, fenced(ordered(sums, dtype), 5), 5, as_array(torch.empty(0, dtype=dtype)))

    assert torch.equal(torch.from_numpy(out[3:35]), before + sums)
    assert np.isnan(out[:3]).all()
    assert np.isnan(out[35:]).all()


@dataclass
class Sum:
    """A vector to which columns `first` to `last` of some rows of weights are added, each times its factor."""

    before: Tensor
    factors: Tensor
    weights: Tensor
    places: list[int]
    first: int
    last: int

    @classmethod
    def make(cls, make: Callable[..., Tensor], count: int, dtype: torch.dtype, first: int = 0, last: int = 96) -> "Sum":
        places = [8, 0, 3, 5, 1, 7][:count]
        weights = make(9, 96, seed=3).to(dtype)
        return cls(make(last - first, seed=1), make(count, seed=2), weights, places, first, last)

    @property
    def exact(self) -> Tensor:
        return self.before + self.factors @ self.weights[self.places, self.first : self.last].float()

    def run(self, kernel: Callable[..., None], *, split: int | None = None, at: int = 0) -> Tensor:
        """Add all rows with a list, or four from the one numbered `at` on."""
        dtype, size = self.weights.dtype, self.last - self.first
        out = fenced(ordered(self.before, dtype), 3)
        factors, weights = fenced(self.factors, 2), fenced(self.weights.float(), BASE, dtype)
        places, base, stride = np.array([-1, -1, *self.places]), BASE + self.first, self.weights.shape[1]
        if split is None:
            kernel(out, 3, factors, 2 + at, weights, base, places, 2 + at, stride, size)
        else:
            kernel(out, 3, factors[2:], places[2:], split, len(self.places), weights, base, stride, size)
        assert np.isnan(out[:3]).all()
        assert np.isnan(out[3 + size :]).all()
        return torch.from_numpy(out[3 : 3 + size])


some_columns = pytest.mark.parametrize(("first", "last"), [(0, 96), (32, 96), (64, 96)])


@pytest.mark.parametrize("dtype", DTYPES)
@some_columns
def test_adding_four_rows_of_small_integers_is_exact(first: int, last: int, dtype: torch.dtype) -> None:
    case = Sum.make(small_integers, 4, dtype, first, last)

    assert torch.equal(case.run(call_add_rows_4), ordered(case.exact, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 2, 5])
@some_columns
def test_adding_listed_rows_of_small_integers_is_exact(first: int, last: int, count: int, dtype: torch.dtype) -> None:
    case = Sum.make(small_integers, count, dtype, first, last)

    for split in range(count + 1):
        for kernel in (call_add_listed_rows, call_add_listed_pairs):
            assert torch.equal(case.run(kernel, split=split), ordered(case.exact, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_listed_rows_are_added_one_after_another_as_four_are(dtype: torch.dtype) -> None:
    case = Sum.make(normal, 4, dtype)

    assert torch.equal(case.run(call_add_listed_rows, split=0), case.run(call_add_rows_4))


@pytest.mark.parametrize("dtype", DTYPES)
@some_columns
def test_one_row_after_another_is_what_four_at_once_are(first: int, last: int, dtype: torch.dtype) -> None:
    case = Sum.make(normal, 4, dtype, first, last)
    out, factors = fenced(ordered(case.before, dtype), 3), fenced(case.factors, 2)
    weights, size = fenced(case.weights.float(), BASE, dtype), last - first

    places = [BASE + first + place * case.weights.shape[1] for place in case.places]
    for i, at in enumerate(places):
        call_add_row(out, 3, factors, 2 + i, weights, at, size)

    assert torch.equal(torch.from_numpy(out[3 : 3 + size]), case.run(call_add_rows_4))
    assert np.isnan(out[:3]).all()
    assert np.isnan(out[3 + size :]).all()


@pytest.mark.parametrize("split", [0, 1, 3, 6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pairs_are_two_sums_that_are_added_to_what_is_there_together(dtype: torch.dtype, split: int) -> None:
    case = Sum.make(normal, 6, dtype)

    def part(rows: slice) -> Tensor:
        some = replace(case, before=torch.zeros(96), factors=case.factors[rows], places=case.places[rows])
        return some.run(call_add_listed_rows, split=0)

    expected = ordered(case.before, dtype) + (part(slice(0, split)) + part(slice(split, 6)))
    assert torch.equal(case.run(call_add_listed_pairs, split=split), expected)


def test_transpose16() -> None:
    values = torch.arange(16.0 * 16).reshape(16, 16)
    out = torch.full((17, 21), torch.nan)

    call_transpose16(fenced(values, 3), 3, out.numpy().reshape(-1), 5, 21)

    assert torch.equal(out[:16, 5:], values.T)
    out[:16, 5:] = torch.nan
    assert out.isnan().all()


def test_transpose16_in_place() -> None:
    values = torch.arange(16.0 * 16).reshape(16, 16)
    found = fenced(values, 3)

    call_transpose16(found, 3, found, 3, 16)

    np.testing.assert_array_equal(found, fenced(values.T, 3))


def test_interleave32() -> None:
    weights = np.random.default_rng(0).integers(0, 2**16, (3, 40)).astype(np.uint16)
    out = np.zeros(60, np.uint32)

    call_interleave32(out, 2, 40, weights.reshape(-1), 5, 80)

    low, high = weights[0, 5:37], weights[2, :32]
    expected = np.zeros_like(out)
    pairs = np.stack((low, high), axis=-1).reshape(-1).view(np.uint32)
    expected[2:18], expected[40:56] = pairs[:16], pairs[16:]
    np.testing.assert_array_equal(out, expected)


def test_interleave4() -> None:
    weights = np.random.default_rng(0).integers(-128, 128, 5 + 4 * 80).astype(np.int8)
    out = np.zeros(4 * 20 + 3, np.uint32)

    call_interleave4(out, 3, 20, weights, 5, 80)

    expected = np.zeros_like(out)
    fours = np.ascontiguousarray(weights[5:].reshape(4, 80)[:, :64].T).view(np.uint32).reshape(4, 16)
    for quarter, values in enumerate(fours):
        expected[3 + 20 * quarter : 3 + 20 * quarter + 16] = values
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(("kind", "size"), [(np.float32, 8), (np.float32, 96), (np.uint16, 48), (np.int8, 32)])
def test_copy64(kind: type, size: int) -> None:
    source = np.random.default_rng(0).integers(0, 100, size + 9).astype(kind)
    out = np.zeros(size + 9, kind)

    call_copy64(source, 5, out, 2, size)

    expected = np.zeros_like(out)
    expected[2 : 2 + size] = source[5 : 5 + size]
    np.testing.assert_array_equal(out, expected)


def test_a_prefetch_may_lie_outside_and_changes_nothing() -> None:
    values = np.arange(10.0)

    for at in (0, 9, 10, 10**12, -(10**12)):
        call_prefetch(values, at)

    assert values.tolist() == list(range(10))
