"""Values of a group as integers, compared with NumPy."""

import numpy as np
import pytest
from numba import njit
from numpy.typing import NDArray

from engine.kernels.cpu.integer_rows import LARGEST
from engine.kernels.cpu.integer_simd import ROUNDED, largest_of, round_values, split_values


@njit
def largest(values: NDArray[np.float32], at: int) -> np.float32:
    return np.int32(largest_of(values, at)).view(np.float32)  # type: ignore[no-any-return]


@njit
def rounded(values: NDArray[np.float32], at: int, inverse: np.float32, out: NDArray[np.int16]) -> np.int32:
    return round_values(values, at, inverse, out, at)  # type: ignore[no-any-return]


@njit
def split(values: NDArray[np.int16], high: NDArray[np.int8], low: NDArray[np.int8]) -> None:
    split_values(values, 0, high, low, 0)


def values_of(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 3, ROUNDED + 7).astype(np.float32)


@pytest.mark.parametrize("at", [0, 3, 7])
@pytest.mark.parametrize("seed", range(8))
def test_the_largest_is_that_of_both_signs(seed: int, at: int) -> None:
    values = values_of(seed)
    values[seed % len(values)] = -50.0 if seed % 2 else 0.0

    assert largest(values, at) == np.abs(values[at : at + ROUNDED]).max()


def test_the_largest_of_zeros_of_both_signs_is_zero() -> None:
    zeros = np.zeros(ROUNDED, np.float32)
    zeros[::2] = -0.0

    assert largest(zeros, 0) == 0


def test_nan_is_larger_than_all() -> None:
    values = values_of(0)
    values[5], values[9] = np.nan, np.inf

    assert np.isnan(largest(values, 0))


@pytest.mark.parametrize("at", [0, 3, 7])
@pytest.mark.parametrize("seed", range(8))
def test_rounding_and_its_sum(seed: int, at: int) -> None:
    values = values_of(seed)
    inverse = LARGEST / np.abs(values).max()
    out = np.full(len(values), 77, np.int16)
    expected = np.rint(values[at : at + ROUNDED] * inverse).astype(np.int16)

    assert rounded(values, at, inverse, out) == expected.sum(dtype=np.int64)
    np.testing.assert_array_equal(out[at : at + ROUNDED], expected)
    assert (np.delete(out, range(at, at + ROUNDED)) == 77).all()


def test_halves_go_to_even() -> None:
    values = np.arange(ROUNDED, dtype=np.float32) - np.float32(15.5)
    out = np.empty(ROUNDED, np.int16)

    rounded(values, 0, np.float32(1), out)

    np.testing.assert_array_equal(out, np.rint(values).astype(np.int16))


@pytest.mark.parametrize("first", [*range(-int(LARGEST), int(LARGEST), 997), int(LARGEST) - ROUNDED + 1])
def test_two_parts_make_the_whole(first: int) -> None:
    whole = (first + np.arange(ROUNDED)).clip(max=int(LARGEST)).astype(np.int16)
    high, low = np.empty(ROUNDED, np.int8), np.empty(ROUNDED, np.int8)

    split(whole, high, low)

    np.testing.assert_array_equal(128 * high.astype(np.int32) + low, whole)
    assert (abs(low.astype(np.int32)) <= 64).all()
