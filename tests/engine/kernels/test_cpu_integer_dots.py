"""Products with rows of 8-bit and 4-bit weights by vectors: groups in lanes, their exact sums, scales and minima."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numba import njit
from numpy.typing import NDArray

from engine.kernels.cpu.integer_dots import multiply_bytes, multiply_bytes_plainly
from engine.kernels.cpu.integer_plain import multiply_neurons
from engine.kernels.cpu.integer_rows import LARGEST, PlainIntegerRows
from engine.kernels.cpu.quantised import (
    INT4_GROUP,
    INT4_UNIT,
    INT8_GROUP,
    INT8_UNIT,
    LANES,
    PlainIntegerWeight,
    lane_order,
)
from tests.engine.kernels.integers import bits, compiled, integer_vector, integers, powers, rng

Array = NDArray[Any]
MOST = int(LARGEST)
ROWS, NEURONS = 7, 6
# Groups that fill the lanes once or twice, and what is left of them in every combination.
SIZES = [64, 128, 192, 256, 448, 512, 576, 960, 1024 + 64]
every_size = pytest.mark.parametrize("size", SIZES)
both_widths = pytest.mark.parametrize("int4", [False, True], ids=["int8", "int4"])


@pytest.mark.parametrize(("group", "unit"), [(INT8_GROUP, INT8_UNIT), (INT4_GROUP, INT4_UNIT)])
@every_size
def test_a_lane_has_values_of_one_group(size: int, group: int, unit: int) -> None:
    order = lane_order(size, group, unit)

    np.testing.assert_array_equal(np.sort(order), np.arange(size // unit))
    groups = order.reshape(-1, LANES) * unit // group
    whole = size // group // LANES * group // unit  # vectors of groups that have a lane each
    assert (groups[:whole] % LANES == np.arange(LANES)).all()
    assert (np.diff(groups, axis=1) >= 0).all()
    if size == 64 and unit == INT8_UNIT:  # one group has all lanes
        np.testing.assert_array_equal(order, np.arange(32))


@pytest.mark.parametrize("multiply", [multiply_bytes, multiply_bytes_plainly])
def test_bytes_are_multiplied_and_added_two_by_two(multiply: Callable[..., Any]) -> None:
    unsigned, signed = rng(1).integers(0, 16, 32).astype(np.uint8), integers(32, seed=2, most=127, dtype=np.int8)
    found = np.zeros(16, np.int16)

    line = integer_vector(8, 4 * LANES)
    compiled(multiply, line, line)(found, unsigned, signed)

    np.testing.assert_array_equal(found, (unsigned.astype(np.int64) * signed).reshape(16, 2).sum(1))


class Case:
    """Random token rows and weights, in their natural order and as kernels want them."""

    def __init__(self, size: int, *, int4: bool) -> None:
        group, unit = (INT4_GROUP, INT4_UNIT) if int4 else (INT8_GROUP, INT8_UNIT)
        self.size, self.groups = size, size // group
        self.words = integers(ROWS, size, seed=1, most=MOST, dtype=np.int16)
        self.words[2], self.words[3] = MOST, -MOST  # the largest sums that there are
        self.row_scales, self.row_sums = powers(ROWS, self.groups, seed=3), powers(ROWS, self.groups, seed=4)
        self.scales, minima = powers(NEURONS, self.groups, seed=5), -powers(NEURONS, self.groups, seed=6)
        order = lane_order(size, group, unit)
        if int4:
            self.values = rng(2).integers(0, 16, (NEURONS, size)).astype(np.uint8)
            self.values[1] = 15
            self.minima = minima
            high = (self.words.astype(np.int32) + 64) >> 7
            parts = np.stack([high, self.words - (high << 7)], 1).astype(np.int8)
            packed = self.values.view(np.uint32).take(order, 1).view(np.uint8).reshape(NEURONS, -1, 2, 32)
            stored = packed[:, :, 0] | packed[:, :, 1] << 4
            rows = parts.view(np.uint32).take(order, 2).view(np.int8)
        else:
            self.values = integers(NEURONS, size, seed=2, most=127, dtype=np.int8)
            self.values[1] = 127
            self.minima = np.zeros_like(minima)
            stored = self.values.view(np.uint16).take(order, 1).view(np.int8)
            rows = self.words.view(np.uint32).take(order, 1).view(np.int16)
        some = bits(minima).reshape(-1) if int4 else np.empty(0, np.uint16)
        self.weights = PlainIntegerWeight(stored.reshape(-1), bits(self.scales).reshape(-1), some)
        self.inputs = PlainIntegerRows(rows.reshape(-1), order, self.row_scales.reshape(-1), self.row_sums.reshape(-1))

    def multiply(self, first: int, last: int, neurons: list[int], base: int = 0) -> Array:
        """float32 [last - first, neurons], in a wider array that must stay as it is beside them."""
        places = np.array([-1, *neurons, -1])
        out = np.full((last - first, len(neurons) + 2), np.nan, np.float32)
        call(
            self.inputs,
            first,
            last,
            self.size,
            self.weights,
            base,
            places,
            1,
            len(neurons),
            1,
            out.reshape(-1),
            1,
            out.shape[1],
        )
        assert np.isnan(out[:, [0, -1]]).all()
        return out[:, 1:-1]

    def expected(self) -> tuple[Array, Array]:
        """float64 [ROWS, NEURONS], and the sum of the absolute values of what each adds up."""
        parts = self.words.astype(np.int64)[:, None] * self.values.astype(np.int64)[None]
        grouped = parts.reshape(ROWS, NEURONS, self.groups, -1)
        factors = self.row_scales[:, None].astype(np.float64) * self.scales[None]
        offsets = self.row_sums[:, None].astype(np.float64) * self.minima[None]
        magnitudes = np.abs(grouped).sum(-1) * factors + np.abs(offsets)
        return (grouped.sum(-1) * factors + offsets).sum(-1), magnitudes.sum(-1)


@njit
def call(inputs, first, last, size, weights, base, places, listed, count, ahead, out, at, stride):  # type: ignore[no-untyped-def]
    multiply_neurons(inputs, first, last, size, weights, base, places, listed, count, ahead, out, at, stride)


@both_widths
@every_size
def test_products_are_those_of_the_integers_with_scales_and_minima(size: int, int4: bool) -> None:
    case = Case(size, int4=int4)

    found = case.multiply(0, ROWS, list(range(NEURONS)))

    expected, magnitude = case.expected()
    assert (np.abs(found - expected) <= 2.0**-22 * magnitude).all()


@both_widths
@pytest.mark.parametrize(("first", "last"), [(0, 1), (2, 4), (1, 4), (2, 6), (3, ROWS)])
def test_rows_and_neurons_have_the_same_bits_whatever_is_beside_them(first: int, last: int, int4: bool) -> None:
    case = Case(576, int4=int4)
    whole = case.multiply(0, ROWS, list(range(NEURONS)))

    found = case.multiply(first, last, [2, 0, 3], base=2)

    np.testing.assert_array_equal(found, whole[first:last, [4, 2, 5]])
