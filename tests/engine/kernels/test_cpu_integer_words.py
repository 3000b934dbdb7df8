"""Products of 16-bit integers by vectors, and `down` by them: exact sums of each group, taken in with their scales."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numba import njit
from numpy.typing import NDArray

from engine.kernels.cpu.integer_rows import LARGEST
from engine.kernels.cpu.integer_words import (
    COLUMNS,
    LISTED,
    TOKENS,
    WIDTH,
    add_group,
    add_neurons,
    multiply_words,
    multiply_words_plainly,
)
from engine.kernels.cpu.quantised import INT8_GROUP
from tests.engine.kernels.integers import bits, compiled, integer_vector, integers, powers

Array = NDArray[Any]
MOST = int(LARGEST)
SIZE, ROWS = 192, 7


@pytest.mark.parametrize("multiply", [multiply_words, multiply_words_plainly])
def test_words_are_multiplied_two_by_two_and_added(multiply: Callable[..., Any]) -> None:
    a, b = (integers(2 * WIDTH, seed=seed, most=MOST, dtype=np.int16) for seed in (1, 2))
    total = integers(WIDTH, seed=3, most=1000, dtype=np.int32)
    expected = total + (a.astype(np.int64) * b).reshape(WIDTH, 2).sum(1)

    words = integer_vector(16, 2 * WIDTH)
    compiled(multiply, integer_vector(32, WIDTH), words, words)(total, total, a, b)

    np.testing.assert_array_equal(total, expected)


@njit
def call_group(totals, words, row, intermediate, row_scales, values, scales, group, hidden, column):  # type: ignore[no-untyped-def]
    add_group(totals, words, row, intermediate, row_scales, values, scales, group, hidden, column)


def test_a_group_of_neurons_is_added_to_some_columns_of_some_rows() -> None:
    hidden, groups, group, row, column = 160, SIZE // INT8_GROUP, 1, 2, 64
    words = integers(ROWS, SIZE, seed=1, most=MOST, dtype=np.int16)
    values = integers(SIZE, hidden, seed=2, most=127, dtype=np.int8)
    row_scales, scales = powers(ROWS, groups, seed=3), powers(groups, hidden, seed=4)
    before = powers(ROWS, hidden, seed=5)
    totals = before.copy()

    arrays = [array.reshape(-1) for array in (totals, words, row_scales, values, bits(scales))]
    call_group(arrays[0], arrays[1], row, SIZE, arrays[2], arrays[3], arrays[4], group, hidden, column)

    own, places = slice(row, row + TOKENS), slice(column, column + COLUMNS)
    neurons = slice(group * INT8_GROUP, (group + 1) * INT8_GROUP)
    sums = (words[own, neurons].astype(np.int64) @ values[neurons, places].astype(np.int64)).astype(np.float32)
    factors = (row_scales[own, group, None] * scales[None, group, places]).astype(np.float64)
    expected = before.copy()
    expected[own, places] = (before[own, places] + sums * factors).astype(np.float32)
    np.testing.assert_array_equal(totals, expected)


@njit
def call_neurons(counts, words, at, values, base, places, places_at, hidden, columns):  # type: ignore[no-untyped-def]
    add_neurons(counts, words, at, values, base, places, places_at, hidden, columns)


def test_listed_neurons_are_added_to_columns() -> None:
    hidden, first, columns = 96, 16, 48
    words = integers(1 + LISTED, seed=1, most=MOST, dtype=np.int16)
    values = integers(20, hidden, seed=2, most=127, dtype=np.int8)
    places = np.array([-1, 3, 17, 0, 3])
    before = integers(hidden, seed=3, most=1000, dtype=np.int32)
    counts = before.copy()

    call_neurons(counts, words, 1, values.reshape(-1), first, places, 1, hidden, columns)

    expected = before.copy()
    expected[:columns] += words[1:].astype(np.int32) @ values[places[1:], first : first + columns].astype(np.int32)
    np.testing.assert_array_equal(counts, expected)
